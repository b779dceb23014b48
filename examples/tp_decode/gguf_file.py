"""The header of a GGUF file: metadata and where each tensor lies.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. The gguf package
has a reader too, but it makes several numpy views per string: 5 s for the 98 000 strings of SmolLM2's tokenizer, where
this takes 0.1 s. Undoing the quantisation stays with that package.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from errors import UsageError

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the file describes it."""

    shape: tuple[int, ...]  # outermost first, as in torch; the file has it the other way round
    kind: int  # ggml type, e.g. 3 = Q4_1
    offset: int  # bytes from the start of the file


class Header:
    """Reads a GGUF file's metadata into `fields` and its tensors' places into `tensors`; `data` maps the whole file."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
        self.position = 0
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        if self.data[:4] != b"GGUF":
            raise UsageError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
        try:
            self.parse()
        except (struct.error, KeyError, ValueError) as error:
            raise UsageError(f"{path} is damaged or cut short near byte {self.position}: download it again") from error

    def parse(self) -> None:
        self.position = 4
        version = self.scalar("I")
        if version not in (2, 3):
            raise UsageError(f"GGUF version {version} is not read here (2 and 3 are): convert the file anew")
        tensors, fields = self.scalar("Q"), self.scalar("Q")
        for _ in range(fields):
            name = self.string()
            self.fields[name] = self.value(self.scalar("I"))
        places = {}
        for _ in range(tensors):
            name = self.string()
            shape = [self.scalar("Q") for _ in range(self.scalar("I"))]
            places[name] = TensorInfo(tuple(reversed(shape)), self.scalar("I"), self.scalar("Q"))
        alignment = self.fields.get("general.alignment", 32)
        start = -(-self.position // alignment) * alignment
        self.tensors = {n: TensorInfo(info.shape, info.kind, start + info.offset) for n, info in places.items()}

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        start = self.position + 8
        end = start + self.scalar("Q")
        if end > len(self.data):
            raise ValueError("string beyond the end of the file")
        self.position = end
        return self.data[start:end].decode(errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.scalar(SCALARS[kind])
        element, count = self.scalar("I"), self.scalar("Q")
        if element in (STRING, ARRAY):
            return [self.value(element) for _ in range(count)]
        values = np.frombuffer(self.data, np.dtype("<" + SCALARS[element]), count, self.position)
        self.position += values.nbytes
        return values.tolist()

    def rows(self, info: TensorInfo, row_nbytes: int, rows: range) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """[len(rows), row_nbytes] bytes of a matrix, or of a vector as rows of one element; a view of the file."""
        count = len(rows) * row_nbytes
        start = info.offset + rows.start * row_nbytes
        return np.frombuffer(self.data, np.uint8, count, start).reshape(len(rows), row_nbytes)
