"""Ways in which files get damaged, drawn from a seed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

ODD = [None, True, -1, 0, 2**70, 1e308, -0.5, "", "x", "../..", "\x1b[31m", [], {}, [[]], {"a": 1}, "nan", 1e-320]


def damage_file(path: Path, rng: random.Random) -> str:
    """Damage one file; what was done."""
    kinds = [_flip, _cut, _empty, _remove, _append]
    if path.suffix in (".json", ".jsonl", ".yaml"):
        kinds += [_text, _line_twice]
    if path.suffix == ".json":
        kinds += [_leaf] * 5
    return rng.choice(kinds)(path, rng)


def _flip(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    if content:
        at = rng.randrange(len(content))
        content[at] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(content))
    return "a bit flipped"


def _cut(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) + 1)])
    return "cut"


def _empty(path: Path, rng: random.Random) -> str:
    path.write_bytes(b"")
    return "emptied"


def _remove(path: Path, rng: random.Random) -> str:
    path.unlink()
    return "removed"


def _append(path: Path, rng: random.Random) -> str:
    path.write_bytes(path.read_bytes() + rng.choice([b"\0" * 9, b"}", b"\xff\xfe", b"[[[" * 3000, b"\n{}\n"]))
    return "something appended"


def _text(path: Path, rng: random.Random) -> str:
    text = rng.choice(["null", "[]", "{}", "[" * 100_000, '"x"', "1", "{" * 5, "a: &a [*a]", "\x00", "- 1\n- 2"])
    path.write_text(text)
    return f"is {text[:9]!r} now"


def _line_twice(path: Path, rng: random.Random) -> str:
    lines = path.read_bytes().splitlines(keepends=True)
    if lines:
        at = rng.randrange(len(lines))
        path.write_bytes(b"".join([*lines[:at], lines[at], *lines[at:]]))
    return "a line twice"


def _leaf(path: Path, rng: random.Random) -> str:
    """A value, a key or an entry is another, or gone."""
    try:
        value = json.loads(path.read_text())
    except ValueError:
        return _empty(path, rng)
    where: list[Any] = []
    node: Any = value
    while isinstance(node, (dict, list)) and node and (not where or rng.random() < 0.8):
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        where.append((node, key))
        node = node[key]
    if not where:
        return _empty(path, rng)
    parent, key = where[-1]
    if rng.random() < 0.2:
        del parent[key]
        done = "gone"
    else:
        parent[key] = rng.choice(ODD)
        done = f"{parent[key]!r}"
    path.write_text(json.dumps(value))
    return f"{'.'.join(str(key) for _, key in where)} is {done}"
