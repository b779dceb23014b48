"""One run of vLLM, in its environment: python vllm_program.py RESULT MODEL RANKS {eager,compiled} WORKERS

Decodes one prompt greedily and writes to RESULT what came out and how often each rank's hxcomm did which collective
meanwhile and in total. WORKERS: the module of the class that is added to vLLM's workers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

PROMPT = "The capital of France is"
NEW_TOKENS = 16


def main() -> None:
    """In the process that starts the engine: those that vLLM starts import this module, too."""
    from vllm import LLM, SamplingParams

    result, model, ranks, mode, workers = sys.argv[1:]
    engine = LLM(
        model,
        dtype="float32",
        tensor_parallel_size=int(ranks),
        enforce_eager=mode == "eager",
        max_model_len=256,
        worker_extension_cls=f"{workers}.Workers",
    )
    before = engine.collective_rpc("communication")
    wanted = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0)
    (answer,) = engine.generate([PROMPT], wanted)
    after = engine.collective_rpc("communication")
    (made,) = answer.outputs
    report = {
        "prompt": PROMPT,
        "text": made.text,
        "tokens": list(made.token_ids),
        "logprobs": [each[token].logprob for each, token in zip(made.logprobs, made.token_ids, strict=True)],
        "names": after[0][0],
        "totals": [now for _, now in after],
        "calls": [
            {op: count - then.get(op, 0) for op, count in now.items() if count > then.get(op, 0)}
            for (_, then), (_, now) in zip(before, after, strict=True)
        ],
    }
    Path(result).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
