"""The secret of a job, and the keys that ranks on different hosts know each other by.

Every rank derives the same keys from the secret, so none are exchanged: two CURVE key pairs (one of the end that binds,
one of the end that connects) and a key for message authentication codes, by HKDF (RFC 5869) over HMAC-SHA256. The run's
name is the salt: it separates the keys of two runs with one secret and need not be secret itself.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85

from hxcomm import environment

KEY_BYTES = 32
_MOST_SECRET_BYTES = 4096
_SALT = b"hxcomm 1 "  # another version of the derivation gives other keys
_HOW = (
    "make a secret once with `(umask 077; openssl rand -hex 32 > hxcomm.secret)`, bring the file to every host where "
    "it is not shared, with mode 0600 and owned by who runs the ranks (docs/launch.md: Slurm, Kubernetes, Ray), and "
    "set HXCOMM_SECRET_FILE=PATH/hxcomm.secret for every rank. Or set HXCOMM_INSECURE=1 for every rank where everyone "
    "who can reach this address may read and forge the traffic"
)


@dataclass(frozen=True)
class Security:
    """How traffic between hosts is protected. All keys have 32 bytes; without protection they are empty."""

    mode: str  # none, curve or mac
    server_secret: bytes = field(default=b"", repr=False)  # CURVE, of every socket that binds
    server_public: bytes = b""
    client_secret: bytes = field(default=b"", repr=False)  # CURVE, of every socket that connects
    client_public: bytes = b""
    mac_key: bytes = field(default=b"", repr=False)


def load(*, loopback: bool) -> Security:
    """How to protect a socket that binds this address.

    Raises ValueError where the secret cannot be used, and InitError where there is none and the address is not of
    loopback, unless HXCOMM_INSECURE=1.
    """
    path = environment.SECRET_FILE.get()
    secret = read_file(path) if path is not None else environment.SECRET.get()
    if secret is not None:
        return derive(secret, environment.run_id(), environment.SECURITY.get())
    if loopback or environment.INSECURE.get():
        return Security("none")
    from hxcomm.errors import InitError

    raise InitError(f"ranks on several hosts need a secret to know each other by, and there is none: {_HOW}")


def derive(secret: bytes, run_id: str, mode: str) -> Security:
    """The keys of a run. The same arguments give the same keys on every host."""
    extracted = hmac.digest(_SALT + run_id.encode(), secret, hashlib.sha256)

    def key(of: bytes) -> bytes:
        return hmac.digest(extracted, of + b"\x01", hashlib.sha256)

    server, client = key(b"curve server"), key(b"curve client")
    return Security(mode, server, _public(server), client, _public(client), key(b"mac"))


def _public(secret: bytes) -> bytes:
    try:
        return bytes(z85.decode(zmq.curve_public(z85.encode(secret))))
    except zmq.ZMQError as error:
        from hxcomm.errors import InitError

        raise InitError(
            f"the libzmq of pyzmq {zmq.__version__} has no CURVE ({error}); install pyzmq's wheel"
        ) from None


def read_file(path: str) -> bytes:
    """The secret in a file, without white space around it. Raises ValueError saying what is wrong with the file."""
    try:
        # Without O_NONBLOCK, opening a named pipe waits for somebody to write to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ValueError(f"HXCOMM_SECRET_FILE={path!r}: cannot be read: {error.strerror}; {_HOW}") from None
    try:
        if problem := _problem_with(os.fstat(descriptor)):
            raise ValueError(f"HXCOMM_SECRET_FILE={path!r}: {problem}")
        secret = os.read(descriptor, _MOST_SECRET_BYTES + 1).strip()
    finally:
        os.close(descriptor)
    if not environment.LEAST_SECRET_BYTES <= len(secret) <= _MOST_SECRET_BYTES:
        size = f"{len(secret)} bytes" if len(secret) <= _MOST_SECRET_BYTES else f"more than {_MOST_SECRET_BYTES} bytes"
        raise ValueError(
            f"HXCOMM_SECRET_FILE={path!r}: holds {size}; a secret has {environment.LEAST_SECRET_BYTES} to "
            f"{_MOST_SECRET_BYTES}: `openssl rand -hex 32` prints a good one"
        )
    return secret


def _problem_with(found: os.stat_result) -> str | None:
    """Why others than its owner could know or choose what the file holds."""
    if not stat.S_ISREG(found.st_mode):
        return "not a regular file"
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}, and this rank runs as user {os.geteuid()}: chown it, or copy it"
    if found.st_mode & 0o177:
        return f"others may use it, its mode is {stat.S_IMODE(found.st_mode):04o}: chmod 600 it"
    return None
