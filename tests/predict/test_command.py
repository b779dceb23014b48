"""`hxcomm predict` as its users run it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from predict.small_models import OPT

from hxcomm import cli

# 1 TB/s, and a rank's shard of Llama-2 7B in fp16 is more than 5 GB up to two chips.
SMALL_CHIP = """
name = "small"
description = "for tests"
overlap_chunks = 4
[memory]
bandwidth_bytes_per_s = 1e12
capacity_bytes = 5e9
[compute.flops_per_s]
float16 = 1e14
[[links]]
topology = "ring"
bandwidth_bytes_per_s = 25e9
latency_ns = 500
forwarding = "cut_through"
"""
KEYS = ["ranks", "batch", "ttft_ms", "ms_per_token", "tokens_per_s", "joule_per_token", "parts", "fits"]
PARTS = ["weights", "kv_cache", "other", "exposed_communication", "hidden_communication"]


@pytest.fixture
def small_chip(tmp_path: Path) -> str:
    path = tmp_path / "small.toml"
    path.write_text(SMALL_CHIP)
    return str(path)


def predict(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["predict", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def predict_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    status, out, err = predict(capsys, *arguments, "--json")
    assert (status, err) == (0, "")
    return json.loads(out)  # type: ignore[no-any-return]


def test_json_is_one_object_for_each_number_of_ranks_and_batch(capsys: pytest.CaptureFixture[str]) -> None:
    rows = predict_json(capsys, "--model", "smollm2-135m", "--ranks", "1,2", "--batch", "1,8", "--context", "128")
    assert [(row["ranks"], row["batch"]) for row in rows] == [(1, 1), (1, 8), (2, 1), (2, 8)]
    for row in rows:
        assert list(row) == KEYS
        assert list(row["parts"]) == PARTS
        assert row["fits"] is True
        assert sum(row["parts"][name] for name in PARTS[:-1]) == pytest.approx(row["ms_per_token"], rel=1e-12)
        assert row["tokens_per_s"] == row["batch"] * 1000 / row["ms_per_token"]


def test_energy_is_the_chips_power_for_the_time_of_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--model", "smollm2-135m", "--ranks", "2", "--batch", "4", "--context", "128", "--chip", "bertha-500")
    (row,) = predict_json(capsys, *asked, "--set", "power.watts=100")
    assert row["joule_per_token"] == pytest.approx(100 * 2 * row["ms_per_token"] / 1000 / 4)


def test_overlap_hides_communication_and_off_hides_none(capsys: pytest.CaptureFixture[str], small_chip: str) -> None:
    asked = ("--model", "llama-2-7b", "--ranks", "4", "--context", "128", "--chip", small_chip)
    (on,) = predict_json(capsys, *asked)
    (off,) = predict_json(capsys, *asked, "--overlap", "off")
    assert off["parts"]["hidden_communication"] == 0
    assert on["parts"]["hidden_communication"] > 0
    assert on["ms_per_token"] < off["ms_per_token"]


def test_what_does_not_fit_is_refused_with_the_number_of_chips_that_would_do(
    capsys: pytest.CaptureFixture[str], small_chip: str
) -> None:
    asked = ("--model", "llama-2-7b", "--chip", small_chip, "--context", "128")
    status, out, err = predict(capsys, *asked, "--ranks", "1,2,4", "--json")
    assert status == 0
    assert [(row["fits"], row["ms_per_token"] is None) for row in json.loads(out)] == [
        (False, True),
        (False, True),
        (True, False),
    ]
    assert "does not fit 1 chip of 5 GB: a chip would need 13.55 GB (weights 13.48 GB, KV cache 67.1 MB" in err
    assert err.count("it fits from 3 chips on") == 2
    status, out, err = predict(capsys, *asked, "--ranks", "1")
    assert status == 1
    assert "does not fit" in out


def test_the_table_says_units_memory_and_which_algorithms(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = predict(capsys, "--model", "SmolLM2-135M", "--ranks", "1,3", "--context", "128", "--chip", "lpu")
    assert status == 0
    assert "smollm2-135m, weights fp16, context 128, prompt 128" in out
    for words in ("first token", "per token", "tokens/s", "weights", "KV cache", "exposed", "memory of a chip", "ms"):
        assert words in out
    assert "Collectives of a decode step" in out
    assert "all_reduce" in out
    assert "all_gather" in out


def test_other_values_and_links_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--model", "smollm2-135m", "--ranks", "4", "--context", "128", "--overlap", "off")
    (plain,) = predict_json(capsys, *asked)
    (far,) = predict_json(capsys, *asked, "--set", "links.0.latency_ns=5000")
    (line,) = predict_json(capsys, *asked, "--topology", "line:4")
    exposed = [row["parts"]["exposed_communication"] for row in (plain, line, far)]
    assert exposed == sorted(exposed)
    assert exposed[0] < exposed[2]


def test_a_table_of_costs_replaces_the_chips_rates(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table = tmp_path / "ops.csv"
    table.write_text("op,kind,dtype,nbytes,flops,time_ns\naten::mm,,,,,1000\n")
    asked = ("--model", "smollm2-135m", "--ranks", "1", "--context", "128", "--costs", f"table:{table}")
    (row,) = predict_json(capsys, *asked)
    products = 30 * 4 + 1
    assert row["parts"]["weights"] == pytest.approx(products * 1e-3, rel=1e-2)


def test_a_config_of_transformers_is_predicted_from_its_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OPT))
    rows = predict_json(capsys, "--model", str(tmp_path), "--ranks", "1,2", "--context", "128")
    assert [row["ranks"] for row in rows] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--model", "gpt-5"), "no such preset and no such file or folder. Presets are smollm2-135m, llama-2-7b"),
        (("--model", "llama-2-7b", "--context", "8192"), "--context 8192: llama-2-7b has 4096 positions"),
        (("--model", "llama-2-7b", "--prompt", "3000"), "--prompt 3000: is longer than --context 2048"),
        (("--model", "llama-2-7b", "--ranks", "33"), "--ranks 33: llama-2-7b can be split over 1 to 32 ranks"),
        (("--model", "opt-1.3b", "--ranks", "3"), "--ranks 3: opt-1.3b can be split over 1, 2, 4, 8, 16, 32 ranks"),
        (("--model", "llama-2-7b", "--chip", "tpu-v9"), "there is no chip 'tpu-v9'; known are: "),
        (("--model", "llama-2-7b", "--set", "links.0.latency=1"), "links.0.latency: there is no such key; known are"),
        (("--model", "llama-2-7b", "--set", "latency"), "--set latency: write it as KEY=VALUE"),
        (("--model", "llama-2-7b", "--costs", "ops.csv"), "--costs 'ops.csv' names no costs: write table:FILE.csv"),
        (("--model", "llama-2-7b", "--topology", "knot"), "knot"),
        (("--model", "llama-2-7b", "--plot", "no/such/folder/x.png"), "there is no folder no/such/folder"),
    ],
)
def test_what_cannot_be_predicted_is_refused_with_what_is_allowed(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], expected: str
) -> None:
    status, out, err = predict(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("hxcomm predict: ")
    assert expected in err


def test_without_transformers_the_decoders_are_predicted_and_others_say_how(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "hxcomm.predict.transformers_model", raising=False)
    monkeypatch.delattr("hxcomm.predict.transformers_model", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, _, err = predict(capsys, "--model", "opt-1.3b")
    assert status == 2
    assert "needs the package transformers: pip install 'hxcomm[predict]' (without it there are smollm2-135m" in err
    assert predict_json(capsys, "--model", "smollm2-135m", "--ranks", "1", "--context", "64")


def test_the_plot_shows_scaling_with_and_without_overlap(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws only where matplotlib is installed")
    path = tmp_path / "scaling.svg"
    status, _, _ = predict(capsys, "--model", "smollm2-135m", "--ranks", "1,2", "--context", "64", "--plot", str(path))
    assert status == 0
    assert path.read_text(encoding="utf-8").count("<svg") == 1
