"""`hxcomm verify` as a user types it: against hxcomm, against gloo, and against backends with a known fault."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hxcomm.verify import registry
from hxcomm.verify.rank import Answer
from hxcomm.verify.results import outcome

HERE = Path(__file__).resolve().parent
LIMIT_S = 170  # of a command; the checks have limits of their own

SUM = "results/all_reduce[float32-sum]"
DTYPE_MISMATCH = "misuse/dtype_mismatch[all_reduce-float32-int32]"


def verify(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hxcomm.cli", "verify", *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )


def results(tmp_path: Path, *arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit status, the results of the JSON file, and what was printed."""
    file = tmp_path / "results.json"
    ended = verify(*arguments, "--json", str(file))
    assert file.exists(), ended.stdout + ended.stderr
    return ended.returncode, json.loads(file.read_text())["results"], ended.stdout


# --- hxcomm passes ---


@pytest.mark.parametrize(("device", "ranks"), [("cpu", 2), ("cpu", 3), ("hx", 3)])
@pytest.mark.parametrize("category", registry.CATEGORIES)
def test_hxcomm_passes_every_check_of(tmp_path: Path, category: str, device: str, ranks: int) -> None:
    status, found, printed = results(tmp_path, "--device", device, "--ranks", str(ranks), "--only", f"{category}/*")
    assert status == 0, printed
    assert found
    for each in found:
        about = f"{each['case']}: {each['outcome']} {each['message']} {each['notes']}"
        assert each["outcome"] == "pass", about
        assert each["notes"].get("afterwards", "the group is usable") == "the group is usable", about
        if each["case"].startswith("failure/killed"):
            # All survivors alike: what ranks say differently is joined by semicolons.
            error = each["notes"]["the error"]
            assert error.startswith("PeerFailedError, names rank") and ";" not in error, about


@pytest.mark.parametrize(("device", "ranks"), [("cpu", 3), ("hx", 2)])
def test_hxcomm_passes_every_check_of_torchcomms(tmp_path: Path, device: str, ranks: int) -> None:
    status, found, printed = results(tmp_path, "--api", "torchcomms", "--device", device, "--ranks", str(ranks))
    assert status == 0, printed
    assert {each["category"] for each in found} == {"results", "semantics", "point_to_point", "misuse", "failure"}
    for each in found:
        about = f"{each['case']}: {each['outcome']} {each['message']} {each['notes']}"
        assert each["outcome"] == "pass", about
        assert each["notes"].get("afterwards", "the group is usable") == "the group is usable", about
        if each["case"].startswith("failure/killed"):
            error = each["notes"]["the error"]
            assert error.startswith("PeerFailedError, names rank") and ";" not in error, about


# --- what it finds in others ---


def test_a_known_fault_of_gloo_is_red_and_comes_with_its_reproducer(tmp_path: Path) -> None:
    arguments = ["--backend", "gloo", "--ranks", "2"]
    chosen = ["--only", SUM, "--only", DTYPE_MISMATCH, "--html", str(tmp_path / "page.html")]
    status, found, printed = results(tmp_path, *arguments, *chosen)
    assert status == 1
    assert [(each["case"], each["outcome"]) for each in found] == [(SUM, "pass"), (DTYPE_MISMATCH, "fail")]
    assert "returned without an error" in found[1]["message"]
    assert f"hxcomm verify --backend gloo --device cpu --ranks 2 --only {DTYPE_MISMATCH}" in printed
    page = (tmp_path / "page.html").read_text()
    assert found[1]["reproducer"] in page
    require_one_plain_page(page)


def require_one_plain_page(page: str) -> None:
    """Balanced, without scripts, and asking nobody for anything."""

    class Parser(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("script", "link", "img", "iframe"), tag
            assert all(name != "src" and "://" not in (value or "") for name, value in attrs), attrs
            if tag not in ("meta", "br"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    parser = Parser()
    parser.feed(page)
    assert not parser.open


@pytest.mark.parametrize(
    ("backend", "expected"), [("wrong", "fail"), ("hanging", "hang"), ("crashing", "crash"), ("unstartable", "fail")]
)
def test_a_faulty_backend_costs_one_limit_a_check_and_is_red(tmp_path: Path, backend: str, expected: str) -> None:
    cases = [SUM, "results/all_reduce[int32-sum]"]
    arguments = ["--import", "faulty_backends", "--backend", backend, "--ranks", "2,3"]
    arguments += ["--timeout", "3" if backend == "hanging" else "30"]
    chosen = ["--only", cases[0], "--only", cases[1]]
    status, found, printed = results(tmp_path, *arguments, *chosen)
    assert status == 1, printed
    assert [(each["case"], each["ranks"]) for each in found] == [(case, n) for n in (2, 3) for case in cases]
    said = {"wrong": "elements are wrong", "hanging": "did not return", "crashing": "SIGSEGV"}
    for each in found:
        assert each["outcome"] == ("hang" if backend == "hanging" else expected), each
        assert said.get(backend, "there is no such device") in each["message"], each
        assert "--import faulty_backends" in each["reproducer"]


def test_what_a_backend_has_not_got_is_unsupported(tmp_path: Path) -> None:
    arguments = ["--import", "faulty_backends", "--backend", "wrong", "--ranks", "2"]
    status, found, printed = results(tmp_path, *arguments, "--only", "results/broadcast")
    assert status == 0
    assert {each["outcome"] for each in found} == {"unsupported"}
    assert f"{len(found)} unsupported" in printed


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_hung_ranks_end_with_the_command(tmp_path: Path, how: signal.Signals) -> None:
    pipe = tmp_path / "pids"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDWR)  # open for writing, too, so that it never ends
    arguments = ["--import", "faulty_backends", "--backend", "hanging", "--ranks", "2", "--timeout", "150"]
    command = subprocess.Popen(
        [sys.executable, "-m", "hxcomm.cli", "verify", *arguments, "--only", SUM],
        env={**os.environ, "PYTHONPATH": str(HERE), "FAULTY_PIPE": str(pipe), "TMPDIR": str(tmp_path)},
    )
    try:
        text = b""
        while text.count(b"\n") < 2:
            assert select.select([reading], [], [], 60)[0], "the ranks did not come to hang"
            text += os.read(reading, 100)
        ranks = [os.pidfd_open(int(pid)) for pid in text.split()]
        command.send_signal(how)
        assert command.wait(60) == (128 + how if how == signal.SIGTERM else -how)
        for rank in ranks:
            assert select.select([rank], [], [], 60)[0], "a rank is still there"
            os.close(rank)
    finally:
        command.kill()
        command.wait()
        os.close(reading)


# --- verdicts ---


@pytest.mark.parametrize(
    ("kinds", "optional", "expected"),
    [
        ("passed passed", False, "pass"),
        ("passed idle", False, "pass"),
        ("lacking lacking", False, "unsupported"),
        ("lacking idle", False, "unsupported"),
        ("refused refused", True, "unsupported"),
        ("refused refused", False, "fail"),
        ("refused passed", True, "fail"),
        ("lacking passed", False, "fail"),
        ("lacking hung", True, "fail"),
        ("passed hung", False, "hang"),
        ("wrong hung", False, "fail"),
        ("raised passed", False, "fail"),
        ("died hung", False, "crash"),
        ("wrong died", False, "crash"),
    ],
)
def test_verdicts_follow_from_the_answers_of_all_ranks(kinds: str, optional: bool, expected: str) -> None:
    answers = [Answer(kind, "" if kind in ("passed", "idle") else "why") for kind in kinds.split()]
    verdict, message = outcome(answers, optional)
    assert verdict == expected
    assert bool(message) == (expected != "pass")


# --- the command line ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backend", "gluu"], "torch knows no backend 'gluu'; it knows gloo"),
        (["--backend", "nccl"], "built without nccl"),
        (["--ranks", "0"], "'0' is not a number of ranks"),
        (["--ranks", "2,x"], "'x' is not a number of ranks"),
        (["--timeout", "soon"], "'soon' is not a number of seconds"),
        (["--timeout", "0"], "'0' is not a number of seconds"),
        (["--only", "results/all_redcue"], "no check matches results/all_redcue"),
        (["--only", "failure/killed_before", "--ranks", "1"], "need more ranks"),
        (["--device", "vacuum"], "--device vacuum"),
        (["--import", "no_such_module"], "No module named 'no_such_module'"),
        (["--html", "no/such/folder/page.html"], "there is no folder no/such/folder"),
    ],
)
def test_a_wrong_argument_is_a_usage_error_that_says_what_there_is(arguments: list[str], said: str) -> None:
    ended = verify(*arguments)
    assert ended.returncode == 2, ended
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_list_shows_every_case_and_what_it_holds_to(capsys: pytest.CaptureFixture[str]) -> None:
    from hxcomm.cli import main

    assert main(["verify", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line for line in lines if line and not line.startswith("# ")]
    registry.load()
    assert listed == [case.id for case in registry.cases()]
    assert not [name for name, times in Counter(listed).items() if times > 1]
    assert set(registry.CATEGORIES) == {line.split("/")[0] for line in listed}


def test_a_pattern_takes_brackets_literally_and_a_bare_name_takes_all_cases() -> None:
    registry.load()
    assert [case.id for case in registry.matching([DTYPE_MISMATCH])] == [DTYPE_MISMATCH]
    all_of_it = registry.matching(["misuse/dtype_mismatch"])
    assert len(all_of_it) > 3 and registry.matching(["misuse/dtype_mis*"]) == all_of_it
    assert not registry.matching(["misuse/dtype_mismatch[]"])
