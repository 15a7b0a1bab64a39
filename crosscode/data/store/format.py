"""How rows of activations lie in one shard, byte by byte.

R rows of a shard · M models · P hookpoints · D model dimension.

A shard is a plain safetensors file: `sums` (int32, one checksum a row), `scales` (float32, int8 only), `acts` and, where its
info has a checksum of them, `labels` (int32, three a row: see `Labels.packed_R3`).
Its header is a function of the layout, the number of rows and `info`, so that it can be compared as a whole: no
flipped byte of a header goes unseen. A shard appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from crosscode.data.schemas import ShardHeader, ShardInfo
from crosscode.data.store.place import Place, read_range, write_whole
from crosscode.errors import InputError
from crosscode.stored import parse_json

STORE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_TAGS = {"float32": "F32", "bfloat16": "BF16", "int8": "I8"}
LABELS_BYTES = 12
"""Of a row."""
_CHECKSUM_OF_ZEROS = 0x5BD1E995
_MAX_HEADER_BYTES = 1 << 20
_FEWEST_HEADER_BYTES = 4096


class StoreError(InputError):
    """A store that cannot be read, written or used for this run: one line that names the file and the reason."""


class StoreNotWritten(StoreError):
    """The system refused to write; whole shards are as they were."""


@dataclass(frozen=True)
class Layout:
    """One row: `dims` = (M, P, D) in `dtype` ("float32", "bfloat16" or "int8" with one float32 scale per M and P)."""

    dims: tuple[int, int, int]
    dtype: str

    @property
    def n_scales(self) -> int:
        return self.dims[0] * self.dims[1] if self.dtype == "int8" else 0

    @property
    def acts_bytes(self) -> int:
        M, P, D = self.dims
        return M * P * D * STORE_DTYPES[self.dtype].itemsize

    @property
    def read_dtype(self) -> torch.dtype:
        """Of rows as they are handed out."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    @property
    def row_bytes(self) -> int:
        return 4 + 4 * self.n_scales + self.acts_bytes


@dataclass(frozen=True)
class PackedRows:
    """Rows as they lie on disk: `acts_RE` uint8 (E bytes a row), `scales_RMP` float32 (int8 only)."""

    acts_RE: torch.Tensor
    scales_RMP: torch.Tensor | None

    @classmethod
    def empty(cls, n_rows: int, layout: Layout) -> PackedRows:
        acts_RE = torch.empty((n_rows, layout.acts_bytes), dtype=torch.uint8)
        return cls(acts_RE, torch.empty((n_rows, *layout.dims[:2])) if layout.n_scales else None)

    def __getitem__(self, part: slice) -> PackedRows:
        return PackedRows(self.acts_RE[part], None if self.scales_RMP is None else self.scales_RMP[part])

    def sections(self) -> list[torch.Tensor]:
        """The tensors in their order on disk, each as `section_RE` in bytes."""
        scales = [] if self.scales_RMP is None else [self.scales_RMP.flatten(1).view(torch.uint8)]
        return [*scales, self.acts_RE]


def pack(acts_RMPD: torch.Tensor, dtype: str) -> PackedRows:
    """Rows in the store's dtype. int8: `round(x / scale)` with `scale = max |x| / 127` of each vector of D.

    On SmolLM2-135M (layer 14, residual stream) int8 loses 0.14% of the variance and bfloat16 0.0005%; FVU of a linear
    autoencoder that was fitted to int8 rows grows by 0.0001 (benches/data_store.py).
    """
    acts_RMPD = acts_RMPD.detach().cpu()
    scales_RMP = None
    if dtype == "int8":
        largest_RMP = acts_RMPD.float().abs().amax(dim=-1)
        scales_RMP = torch.where(largest_RMP > 0, largest_RMP / 127, 1.0)
        stored_RMPD = (acts_RMPD.float() / scales_RMP[..., None]).round().clamp(-127, 127).to(torch.int8)
    else:
        stored_RMPD = acts_RMPD.to(STORE_DTYPES[dtype])
    acts_RE = stored_RMPD.contiguous().reshape(stored_RMPD.shape[0], -1).view(torch.uint8)
    return PackedRows(acts_RE, scales_RMP)


def unpack(rows: PackedRows, layout: Layout, out_RMPD: torch.Tensor | None = None) -> torch.Tensor:
    """`acts_RMPD`: float32, or bfloat16 for a bfloat16 store; in `out_RMPD`, or else in the rows' memory if it can be."""
    stored_RMPD = rows.acts_RE.view(STORE_DTYPES[layout.dtype]).view(-1, *layout.dims)
    if rows.scales_RMP is None:
        return stored_RMPD if out_RMPD is None else out_RMPD.copy_(stored_RMPD)
    out_RMPD = torch.empty(stored_RMPD.shape) if out_RMPD is None else out_RMPD
    return out_RMPD.copy_(stored_RMPD).mul_(rows.scales_RMP[..., None])


def row_sums(rows: PackedRows) -> np.ndarray:
    """One int32 a row: the wrapping sum of its 32-bit words (of its bytes, where they do not divide by four)."""
    acts_RE = rows.acts_RE.numpy()
    words = acts_RE.view(np.int32) if acts_RE.shape[1] % 4 == 0 else acts_RE
    sums_R = words.sum(axis=1, dtype=np.int32)
    if rows.scales_RMP is not None:
        sums_R += rows.scales_RMP.reshape(len(sums_R), -1).numpy().view(np.int32).sum(axis=1, dtype=np.int32)
    return sums_R + np.int32(_CHECKSUM_OF_ZEROS)


def shard_name(index: int) -> str:
    return f"shard-{index:06d}.safetensors"


def write_shard(
    folder: Place,
    index: int,
    layout: Layout,
    rows: list[PackedRows],
    info: dict[str, Any],
    labels_R3: np.ndarray | None = None,
) -> int:
    """Write, flush to the device, then rename; the number of bytes. Raises OSError, leaving no partial file."""
    n_rows = sum(part.acts_RE.shape[0] for part in rows)
    if labels_R3 is not None:
        info = {**info, "labels": f"{zlib.crc32(labels_R3.tobytes()):08x}"}
    header = _header(layout, n_rows, {**info, "index": index})
    arrays = [row_sums(part) for part in rows]
    arrays += [part.scales_RMP.numpy() for part in rows if part.scales_RMP is not None]
    arrays += [part.acts_RE.numpy() for part in rows]
    arrays += [] if labels_R3 is None else [labels_R3]
    write_whole(folder / shard_name(index), [header, *arrays], new=True)
    return len(header) + sum(array.nbytes for array in arrays)


def read_shard_header(path: Place, index: int, layout: Layout) -> tuple[int, int, dict[str, Any]]:
    """(rows, offset of the data, info) of a shard. Raises StoreError if anything about it is not as written."""
    try:
        begin = read_range(path, 0, _FEWEST_HEADER_BYTES)
        length = int.from_bytes(begin[:8], "little")
        rest = read_range(path, len(begin), 8 + length) if len(begin) < 8 + length <= _MAX_HEADER_BYTES else b""
        text = (begin + rest)[8 : 8 + length] if length <= _MAX_HEADER_BYTES else b""
    except OSError as error:
        raise StoreError(f"store: shard {str(path)!r} cannot be read ({error.strerror or error})") from error
    where = f"store: the header of shard {str(path)!r} is damaged"
    entries = parse_json(text, ShardHeader, where, StoreError)
    n_rows = entries["sums"]["shape"][0]
    info = parse_json(entries["__metadata__"]["info"], ShardInfo, where, StoreError)
    expected = _header(layout, n_rows, info)
    M, P, _ = layout.dims
    norms_fit = len(info["norm_sums"]) == M and all(len(norms) == P for norms in info["norm_sums"])
    if expected != length.to_bytes(8, "little") + text or info["index"] != index or not norms_fit:
        raise StoreError(f"store: the header of shard {str(path)!r} is damaged or belongs to another store")
    labels_bytes = LABELS_BYTES if info.get("labels") else 0
    size, wanted = path.stat().st_size, len(expected) + n_rows * (layout.row_bytes + labels_bytes)
    if size != wanted:
        raise StoreError(f"store: shard {str(path)!r} is {size} bytes long and should be {wanted}; it is damaged")
    return n_rows, len(expected), info


def read_labels(path: Place, n_rows: int, checksum: str | None) -> torch.Tensor:
    """`labels_R3`, with which a shard ends. Raises StoreError where they are not as written."""
    size, end = n_rows * LABELS_BYTES, path.stat().st_size
    content = read_range(path, end - size, end)
    if len(content) != size or f"{zlib.crc32(content):08x}" != checksum:
        raise StoreError(f"store: the labels of shard {str(path)!r} do not match their checksum")
    return torch.frombuffer(bytearray(content), dtype=torch.int32).view(-1, 3)


def _header(layout: Layout, n_rows: int, info: dict[str, Any]) -> bytes:
    """The safetensors header, padded so that the data begins at a multiple of 8."""
    text = json.dumps(info, sort_keys=True)
    entries: dict[str, Any] = {"__metadata__": {"info": text, "crc32": f"{zlib.crc32(text.encode()):08x}"}}
    offset = 0
    shapes = {"sums": ("I32", [n_rows], 4)}
    if layout.n_scales:
        shapes["scales"] = ("F32", [n_rows, *layout.dims[:2]], 4 * layout.n_scales)
    shapes["acts"] = (_TAGS[layout.dtype], [n_rows, *layout.dims], layout.acts_bytes)
    if info.get("labels"):
        shapes["labels"] = ("I32", [n_rows, 3], LABELS_BYTES)
    for name, (tag, shape, bytes_per_row) in shapes.items():
        end = offset + n_rows * bytes_per_row
        entries[name] = {"dtype": tag, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw
