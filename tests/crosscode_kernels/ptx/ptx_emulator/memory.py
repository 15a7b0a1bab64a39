"""Memory that remembers who touched what: bounds, alignment, races, uninitialised reads.

Each byte has the last access that wrote it and the last that read it. Two accesses are ordered where they are of one warp, or of
one block with a barrier between them. A conflict that is not ordered is a race, but for atomics among themselves and for writes
of the value that was written before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ptx_emulator.values import Array

_ATOMIC = 1 << 62
_BLOCK, _EPOCH = 24, 6  # bits below the block's number: 18 of barriers passed, 6 of the warp


class Fault(Exception):
    """What a kernel cannot go on after."""


class Access(NamedTuple):
    """Who accesses memory, by which instruction, and where to report what is wrong."""

    block: int
    epoch: int
    warp: int
    text: str
    report: Callable[[str], None]

    @property
    def code(self) -> int:
        return ((self.block + 1) << _BLOCK) | ((self.epoch & 0x3FFFF) << _EPOCH) | (self.warp + 1)


def _unordered(earlier: Array, code: int) -> Array:
    """Which earlier accesses neither this warp nor a barrier orders before the access `code`."""
    earlier = earlier & ~_ATOMIC
    same_block = (earlier >> _BLOCK) == (code >> _BLOCK)
    same_warp = same_block & ((earlier ^ code) & 63 == 0)
    same_epoch = (earlier ^ code) >> _EPOCH & 0x3FFFF == 0
    return (earlier != 0) & ~same_warp & ~(same_block & ~same_epoch)


@dataclass
class Region:
    """Bytes at addresses from `start` on. `written` is None where every byte has a value from the beginning."""

    start: int
    data: Array
    written: Array | None = None

    def __post_init__(self) -> None:
        self.end = self.start + self.data.size
        self.writer = np.zeros(self.data.size, np.int64)
        self.reader = np.zeros(self.data.size, np.int64)


class Space:
    """A state space ("global" or "shared") made of regions."""

    def __init__(self, name: str, regions: Sequence[Region]) -> None:
        self.name = name
        self.regions = list(regions)

    def load(self, addresses: Array, n_bytes: int, access: Access) -> Array:
        """The bytes at each address [lanes, n_bytes]."""
        out = np.empty((addresses.size, n_bytes), np.uint8)
        for region, lanes, at in self._places(addresses, n_bytes, access):
            if region.written is not None and not region.written[at].all():
                access.report(f"{self.name} memory read that nobody wrote")
            if _unordered(region.writer[at], access.code).any():
                access.report(f"{self.name} race (read after write)")
            region.reader[at] = access.code
            out[lanes] = region.data[at]
        return out

    def store(self, addresses: Array, data: Array, access: Access) -> None:
        """Write `data` [lanes, bytes]."""
        if np.unique(addresses).size < addresses.size:
            _check_lanes_agree(addresses, data, access)
        for region, lanes, at in self._places(addresses, data.shape[1], access):
            changes = region.data[at] != data[lanes]
            if (_unordered(region.writer[at], access.code) & changes).any():
                access.report(f"{self.name} race (write after write)")
            if _unordered(region.reader[at], access.code).any():
                access.report(f"{self.name} race (write after read)")
            region.writer[at] = access.code
            region.data[at] = data[lanes]
            if region.written is not None:
                region.written[at] = True

    def add(self, address: int, value: Array, access: Access) -> Array:
        """Add to one element atomically; what was there."""
        (region, _, at), *_ = self._places(np.array([address]), value.dtype.itemsize, access)
        at = at[0]
        if region.written is not None and not region.written[at].all():
            access.report(f"{self.name} memory read that nobody wrote")
        writer = region.writer[at]
        if (_unordered(writer, access.code) & (writer & _ATOMIC == 0)).any():
            access.report(f"{self.name} race (atomic after write)")
        if (_unordered(region.reader[at], access.code)).any():
            access.report(f"{self.name} race (atomic after read)")
        region.writer[at] = access.code | _ATOMIC
        old = region.data[at].view(value.dtype)
        region.data[at] = (old + value).view(np.uint8)
        return old

    def _places(self, addresses: Array, n_bytes: int, access: Access) -> list[tuple[Region, Array, Array]]:
        """By region: the lanes that mean it, and the indices of their bytes [lanes, n_bytes]."""
        addresses = addresses.astype(np.int64)
        if (addresses % n_bytes).any():
            raise Fault(f"misaligned {self.name} access: {access.text}")
        found, n_left = [], addresses.size
        for region in self.regions:
            lanes = np.flatnonzero((addresses >= region.start) & (addresses + n_bytes <= region.end))
            if lanes.size:
                at = (addresses[lanes] - region.start)[:, None] + np.arange(n_bytes)
                found.append((region, lanes, at))
                n_left -= lanes.size
                if n_left == 0:
                    return found
        raise Fault(f"{self.name} access out of bounds: {access.text}")


def _check_lanes_agree(addresses: Array, data: Array, access: Access) -> None:
    for address in np.unique(addresses):
        rows = data[addresses == address]
        if (rows != rows[0]).any():
            access.report("lanes of a warp store different values at one address")
