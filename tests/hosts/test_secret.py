"""The job's secret: which files are accepted, what is derived from it, and what a user is told."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

import pytest
import zmq
from zmq.utils import z85

from hxcomm import environment, secret

GOOD = b"0123456789abcdef"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*environment.VARIABLES, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def written(path: Path, content: bytes = GOOD, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_a_file_goes_before_the_variable_and_white_space_around_it_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HXCOMM_SECRET", "another secret, 24 bytes")
    of_variable = secret.load(loopback=False)
    monkeypatch.setenv("HXCOMM_SECRET_FILE", str(written(tmp_path / "secret", GOOD + b"\r\n", mode=0o400)))
    assert secret.load(loopback=False) == secret.derive(GOOD, "", "curve") != of_variable
    monkeypatch.delenv("HXCOMM_SECRET_FILE")
    monkeypatch.setenv("HXCOMM_SECRET", GOOD.decode())
    assert secret.load(loopback=False) == secret.derive(GOOD, "", "curve")


def test_a_link_to_a_right_file_is_one_as_kubernetes_mounts_secrets(tmp_path: Path) -> None:
    written(tmp_path / "secret")
    (tmp_path / "link").symlink_to("secret")
    assert secret.read_file(str(tmp_path / "link")) == GOOD


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o700, 0o644])
def test_a_file_that_others_may_use_is_refused_with_the_command_that_repairs_it(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ValueError, match=rf"HXCOMM_SECRET_FILE=.*its mode is {mode:04o}: chmod 600 it"):
        secret.read_file(str(written(tmp_path / "secret", mode=mode)))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "holds 0 bytes"),
        (b"0123456789abcde\n", "holds 15 bytes"),
        (b" " * 100, "holds 0 bytes"),
        (b"x" * 4097, "holds more than 4096 bytes"),
    ],
)
def test_a_file_that_holds_too_little_or_too_much_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    with pytest.raises(ValueError, match=rf"{told}; a secret has 16 to 4096: `openssl rand -hex 32`"):
        secret.read_file(str(written(tmp_path / "secret", content)))


def test_what_is_no_file_is_refused_at_once_and_a_missing_one_says_how_to_make_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="not a regular file"):
            secret.read_file(str(path))
    with pytest.raises(ValueError, match=r"cannot be read: No such file.*openssl rand -hex 32 > hxcomm\.secret"):
        secret.read_file(str(tmp_path / "none"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    os.chown(written(tmp_path / "secret"), 12345, 12345)
    with pytest.raises(ValueError, match="belongs to user 12345, and this rank runs as user 0: chown it, or copy it"):
        secret.read_file(str(tmp_path / "secret"))


def test_without_a_secret_only_loopback_is_bound_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hxcomm.errors import InitError

    assert secret.load(loopback=True) == secret.Security("none")
    for text in ("", "0"):
        monkeypatch.setenv("HXCOMM_INSECURE", text)
        with pytest.raises(InitError, match=r"openssl rand -hex 32 .*HXCOMM_SECRET_FILE=.*Or set HXCOMM_INSECURE=1"):
            secret.load(loopback=False)
    monkeypatch.setenv("HXCOMM_INSECURE", "1")
    assert secret.load(loopback=False) == secret.Security("none")
    monkeypatch.setenv("HXCOMM_SECRET", GOOD.decode())
    assert secret.load(loopback=False) == secret.derive(GOOD, "", "curve")


def test_the_keys_are_those_of_hkdf_with_the_run_as_salt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HXCOMM_SECRET", GOOD.decode())
    monkeypatch.setenv("HXCOMM_SECURITY", "mac")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run 7")
    keys = secret.load(loopback=False)
    extracted = hmac.new(b"hxcomm 1 run 7", GOOD, hashlib.sha256).digest()
    for label, key in ((b"curve server", keys.server_secret), (b"curve client", keys.client_secret)):
        assert key == hmac.new(extracted, label + b"\x01", hashlib.sha256).digest()
    assert keys.mac_key == hmac.new(extracted, b"mac\x01", hashlib.sha256).digest()
    assert keys.mode == "mac"


def test_every_key_is_another_one_and_so_are_those_of_another_run_or_secret() -> None:
    found = [secret.derive(GOOD, "", "curve"), secret.derive(GOOD, "1", "curve"), secret.derive(GOOD + b"0", "", "mac")]
    keys = [
        key
        for each in found
        for key in (each.server_secret, each.server_public, each.client_secret, each.client_public, each.mac_key)
    ]
    assert {len(key) for key in keys} == {secret.KEY_BYTES}
    assert len(set(keys)) == len(keys)


def test_the_public_keys_belong_to_the_secret_ones() -> None:
    keys = secret.derive(GOOD, "", "curve")
    for private, public in ((keys.server_secret, keys.server_public), (keys.client_secret, keys.client_public)):
        assert zmq.curve_public(z85.encode(private)) == z85.encode(public)


def test_no_secret_is_shown_by_repr_or_in_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = secret.derive(GOOD, "", "curve")
    for key in (keys.server_secret, keys.client_secret, keys.mac_key):
        assert repr(key) not in repr(keys)
    monkeypatch.setenv("HXCOMM_SECRET", "hunter2")
    with pytest.raises(ValueError, match=r"^HXCOMM_SECRET=\(not shown\): a secret of 7 bytes") as raised:
        secret.load(loopback=True)
    assert "hunter2" not in str(raised.value)
