"""Positions of the data in a store: where a harvest goes on after so many shards."""

from __future__ import annotations

import json
import re
import zlib
from typing import Any

import safetensors.torch
import torch

from crosscode.data.schemas import PositionHeader
from crosscode.data.store.format import StoreError
from crosscode.data.store.place import Place, write_whole
from crosscode.errors import fitting
from crosscode.stored import parse_json

_POSITION = re.compile(r"resume-(\d{6,})-[0-9a-f]{8}\.safetensors")


def positions(folder: Place) -> dict[Place, int]:
    """The files that hold positions of the data, and the number of shards before each."""
    found = {path: _POSITION.fullmatch(path.name) for path in folder.glob("resume-*.safetensors")}
    return {path: int(match[1]) for path, match in found.items() if match is not None}


def other_positions(folder: Place, n_shards: int) -> list[Place]:
    """Positions after another number of shards: of a shard that was never finished, or that others came after.

    The next shard may end elsewhere than the unfinished one would have; its position must not be mistaken for that.
    """
    return [path for path, n_before in positions(folder).items() if n_before != n_shards]


def write_position(folder: Place, n_shards: int, state: dict[str, Any], finished: bool) -> None:
    tensors = {key: value.contiguous() for key, value in state.items() if isinstance(value, torch.Tensor)}
    plain = {key: value for key, value in state.items() if key not in tensors}
    content = safetensors.torch.save(tensors, {"state": json.dumps(plain), "finished": str(int(finished))})
    write_whole(folder / f"resume-{n_shards:06d}-{zlib.crc32(content):08x}.safetensors", [content])


def last_position(folder: Place, n_shards: int) -> tuple[dict[str, Any] | None, bool]:
    """The position after `n_shards` shards, and whether the data is at its end; (None, False) before the first."""
    found = [read_position(path) for path in sorted(folder.glob(f"resume-{n_shards:06d}-*.safetensors"))]
    if found:
        return max(found, key=lambda item: item[1])
    if n_shards:
        raise StoreError(
            f"store {str(folder)!r}: the position after shard {n_shards - 1} is missing; it can be read only"
        )
    return None, False


def read_position(path: Place) -> tuple[dict[str, Any], bool]:
    content, where = path.read_bytes(), f"store: {str(path)!r}"
    if path.name.split("-")[2] != f"{zlib.crc32(content):08x}.safetensors":
        raise StoreError(f"{where} does not match the checksum in its name; the store can be read only")
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    metadata = parse_json(header, PositionHeader, where, StoreError)["__metadata__"]
    with fitting(f"{where}: the position"):
        tensors = safetensors.torch.load(content)
    plain = parse_json(metadata["state"], dict[str, Any], where, StoreError)
    return {**plain, **tensors}, metadata["finished"] == "1"
