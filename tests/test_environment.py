"""HXCOMM_* variables: what they accept, and what a user is told who gets one wrong."""

from __future__ import annotations

import warnings

import pytest

from hxcomm import environment


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment.VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("variable", environment.VARIABLES.values(), ids=lambda variable: variable.name)
def test_unset_and_empty_variables_have_their_default(
    variable: environment.Variable[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert variable.get() == variable.default
    monkeypatch.setenv(variable.name, " ")
    assert variable.get() == variable.default


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        (environment.ALGO, "all_reduce:ring, broadcast:direct", {"all_reduce": "ring", "broadcast": "direct"}),
        (environment.DEBUG, "algo", {"algo"}),
        (environment.EXECUTOR, "Python", "python"),
        (environment.ISA, "scalar", "scalar"),
        (environment.CHECK, "shape", "shape"),
        (environment.HOST_ID, "left", "left"),
        (environment.IFNAME, "^=eth1,ib", "^=eth1,ib"),
        (environment.INSECURE, "0", False),
        (environment.INSECURE, "1", True),
        (environment.SECRET, "0123456789abcdef", b"0123456789abcdef"),
        (environment.SECURITY, "MAC", "mac"),
        (environment.SEGMENT, "256KiB", 262144),
        (environment.SEGMENT, "1.5 mib", 1572864),
        (environment.SEGMENT, "4096", 4096),
        (environment.SEGMENT, "auto", None),
        (environment.SPIN_US, "0", 0),
        (environment.SPIN_US, "auto", None),
    ],
)
def test_a_right_value_is_read_at_each_call(
    variable: environment.Variable[object], text: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable.name, text)
    assert variable.get() == value


@pytest.mark.parametrize(
    ("name", "text", "advice"),
    [
        ("ALGO", "ring", "'ring' is not op:algorithm; write for example all_reduce:ring"),
        ("ALGO", "all_reduce:ring,all_reduce:one_shot", "all_reduce is given twice, as ring and as one_shot"),
        ("DEBUG", "algos", "not one of algo; did you mean algo"),
        ("EXECUTOR", "pyhton", "not one of native, python; did you mean python"),
        ("ISA", "avx512", "not one of auto, avx2, scalar"),
        ("IFNAME", "^=", "names no interface; write for example eth, =eth0, ^docker,lo"),
        ("INSECURE", "yes", "not 0 or 1"),
        ("SECURITY", "curv", "not one of curve, mac; did you mean curve"),
        ("SEGMENT", "256KB", "KiB, MiB or GiB"),
        ("SEGMENT", "0", "not a whole, positive number of bytes"),
        ("SEGMENT", "0.3", "not a whole, positive number of bytes"),
        ("SPIN_US", "-5", "not a whole number of microseconds, 0 or more, or auto"),
    ],
)
def test_a_wrong_value_raises_with_the_variable_the_value_and_what_is_allowed(
    name: str, text: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = environment.VARIABLES[f"{environment.PREFIX}{name}"]
    monkeypatch.setenv(variable.name, text)
    with pytest.raises(ValueError) as raised:
        variable.get()
    assert str(raised.value).startswith(f"{variable.name}={text!r}: ")
    assert advice in str(raised.value)


def test_what_a_secret_variable_holds_is_in_no_listing_and_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = [variable for variable in environment.VARIABLES.values() if variable.hidden]
    assert [variable.name for variable in hidden] == ["HXCOMM_SECRET"]
    assert environment.SECRET.text() is None
    monkeypatch.setenv("HXCOMM_SECRET", "hunter2")
    assert environment.SECRET.text() == "set, not shown"
    with pytest.raises(ValueError, match="at least 16 are needed: `openssl rand -hex 32`") as raised:
        environment.SECRET.get()
    assert "hunter2" not in str(raised.value)


def test_an_unknown_variable_is_warned_of_once_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_warned_of", set())
    monkeypatch.setenv("HXCOMM_SEGMNT", "1")
    with pytest.warns(RuntimeWarning, match=r"HXCOMM_SEGMNT.*did you mean HXCOMM_SEGMENT\?"):
        environment.warn_about_unknown()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        environment.warn_about_unknown()


def test_every_variable_has_a_type_and_a_meaning_that_ends_as_a_sentence() -> None:
    for variable in environment.VARIABLES.values():
        assert variable.type and variable.meaning.endswith("."), variable.name
