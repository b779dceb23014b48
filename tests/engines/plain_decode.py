"""Runs examples/plain_transformers.py as it stands, then saves what it made, and the logits of one forward more.

    python plain_decode.py OUT FORM FOLDER

FORM is how the example asks for tensor parallelism: as it does (distributed_config), or by the older tp_plan.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "plain_transformers.py"
NEW_FORM = 'distributed_config=DistributedConfig(tp_plan="auto")'


def main() -> None:
    out, form, folder = sys.argv[1:]
    source = EXAMPLE.read_text()
    assert NEW_FORM in source
    if form == "tp_plan":
        source = source.replace(NEW_FORM, 'tp_plan="auto"')
    sys.argv = [str(EXAMPLE), folder]
    made: dict[str, object] = {"__name__": "__main__"}
    exec(compile(source, EXAMPLE, "exec"), made)  # it decides what is imported first

    import torch
    import torch.distributed as dist

    model, tokens = made["model"], made["tokens"]
    with torch.inference_mode():
        logits = model(tokens[:, :-1]).logits  # type: ignore[operator, index]
    torch.save(
        {
            "tokens": tokens.cpu(),  # type: ignore[attr-defined]
            "logits": logits.cpu(),
            "device": str(model.device),  # type: ignore[attr-defined]
            "backends": dist.get_backend_config() if dist.is_initialized() else None,
        },
        Path(out) / f"rank{os.environ.get('RANK', '-alone')}.pt",
    )


if __name__ == "__main__":
    main()
