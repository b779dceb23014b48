"""In which line of a TOML file a key stands: what tomllib does not tell, and every error of a chip file names."""

from __future__ import annotations

import re

_TABLE = re.compile(r"\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(#.*)?$")
_KEY = re.compile(r"""\s*("[^"]*"|'[^']*'|[\w.-]+)\s*=""")


def line_of(text: str, dotted_key: str) -> int:
    """The line, from 1, of a key as in "links.0.latency_ns", or where it is missing of its table, or 0.

    Knows files that are written as chip files are: one key a line.
    """
    wanted = dotted_key
    best, best_length = 0, 0
    prefix = ""
    counts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        header, key = _TABLE.match(line), _KEY.match(line)
        if header:
            prefix = header[2]
            if header[1] == "[[":
                counts[prefix] = counts.get(prefix, -1) + 1
                prefix = f"{prefix}.{counts[prefix]}"
            name = prefix
        elif key:
            name = ".".join(filter(None, (prefix, key[1].strip("\"'"))))
        else:
            continue
        if name == wanted:
            return number
        if (wanted.startswith(name + ".") or name.startswith(wanted + ".")) and len(name) > best_length:
            best, best_length = number, len(name)
    return best
