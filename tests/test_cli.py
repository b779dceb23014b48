"""The `hxcomm` command, as a user types it."""

from __future__ import annotations

import pytest

from hxcomm import algorithms, environment
from hxcomm.cli import main


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("info", "show", "prove", "stats", "tune"))


def test_info_lists_versions_algorithms_and_every_variable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert all(
        word in printed for word in ("torch, built for", "libzmq", "kernels", "cores", "on: 8 chips of 16 GiB each")
    )
    assert all(name in printed for name in environment.VARIABLES)
    assert all(name in printed for op in algorithms.OPS for name in algorithms.names(op))


def test_info_shows_a_wrong_variable_and_what_is_allowed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HXCOMM_EXECUTOR", "pyhton")
    assert main(["info"]) == 1
    assert "HXCOMM_EXECUTOR = WRONG" in (printed := capsys.readouterr().out)
    assert "did you mean python" in printed


def test_info_says_that_a_secret_is_set_and_not_what_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HXCOMM_SECRET", "correct horse battery")
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "HXCOMM_SECRET = set, not shown" in printed
    assert "horse" not in printed


def test_info_says_what_to_do_when_the_extension_is_not_built(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hxcomm.build_check.torch_built_for", lambda: None)
    assert main(["info"]) == 1
    captured = capsys.readouterr()
    assert "not built" in captured.out
    assert "scripts/test.sh" in captured.err


@pytest.mark.parametrize("op", algorithms.OPS)
def test_show_draws_every_algorithm_in_every_form(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in algorithms.names(op):
        for form in ([], ["--staged"], ["--plan", "1"], ["--plan", "1", "--staged"]):
            assert main(["show", op, name, "--ranks", "3", *form]) == 0
            assert capsys.readouterr().out.strip()


def test_show_and_prove_take_the_hosts_of_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "broadcast", "hierarchical", "--hosts", "0,1,1"]) == 0
    assert "on hosts 0,1,1" in capsys.readouterr().out
    assert main(["show", "broadcast", "hierarchical", "--hosts", "0,1,1", "--plan", "1", "--staged"]) == 0
    assert "receive  message 0 from rank 0" in capsys.readouterr().out
    assert main(["prove", "all_reduce", "hierarchical", "--hosts", "0,0,1,1"]) == 0
    assert capsys.readouterr().out == "all_reduce hierarchical: 1 proved; reduces in an order of its own\n"
    for wrong in ("0,a", "1,0", ""):
        with pytest.raises(SystemExit):
            main(["prove", f"--hosts={wrong}"])
        assert "argument --hosts" in capsys.readouterr().err


def test_prove_says_of_an_algorithm_how_many_were_proved_and_in_which_order_it_reduces(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["prove", "all_reduce", "two_shot", "--ranks", "1..4"]) == 0
    assert capsys.readouterr().out == "all_reduce two_shot: 4 proved; reduces in rank order\n"


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["show", "all_redcue", "ring"], "there is no op 'all_redcue'; known are: all_reduce"),
        (["show", "all_reduce", "rnig"], "all_reduce has no algorithm 'rnig'; known are: "),
        (["show", "all_reduce", "ring", "--ranks", "2", "--plan", "2"], "the ranks of world size 2 are 0..1"),
        (["prove", "all_reduce", "rnig"], "two_shot"),
    ],
)
def test_a_wrong_name_gets_the_list_of_right_ones_and_exit_status_2(
    arguments: list[str], advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert advice in capsys.readouterr().err


@pytest.mark.parametrize("ranks", ["0", "x", "4..1", "1..", "-2"])
def test_a_wrong_number_of_ranks_is_refused_with_what_to_write(ranks: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["prove", f"--ranks={ranks}"])
    assert ended.value.code == 2
    assert "--ranks" in capsys.readouterr().err
