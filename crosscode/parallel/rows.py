"""Tensors whose rows are spread over ranks, on disk: the file that one process would write, into which each rank puts its own
rows at their place. Nothing is gathered.

Axes: R rows of this rank.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosscode.parallel.group import Group
from crosscode.weight_files import SpreadTensor

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class SpreadRows(SpreadTensor):
    """`n_rows` rows, of which this rank holds those of `Group.bounds`. What is done with it all ranks do together."""

    def __init__(self, group: Group, rows_R: Tensor, n_rows: int):
        self.group, self.rows_R, self.n_rows = group, rows_R.detach(), n_rows
        self.shape, self.dtype = (n_rows, *rows_R.shape[1:]), rows_R.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def own_rows(self) -> tuple[int, Tensor]:
        return self.group.bounds(self.n_rows)[0], self.rows_R

    def whole(self) -> Tensor:
        """On rank 0 all rows, on the CPU; elsewhere none."""
        ranks = range(self.group.size)
        pieces = [piece for rank in ranks for _, piece in self.group.pieces(self.rows_R, self.n_rows, rank)]
        return torch.cat(pieces) if self.group.is_first else self.rows_R[:0].cpu()

    def save(self, tensors: Mapping[str, Any], file: Path) -> None:
        group = self.group
        spread = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, SpreadRows)}
        file.touch()  # of the others it stays empty, and nobody looks at it
        with _Opened(file) as own:
            where = {}  # of rank 0: what else there is to save may be on it alone
            if group.is_first:
                place, size, header = _layout(tensors)
                os.ftruncate(own.handle, size)
                own.write(header, 0)
                for name in tensors.keys() - spread.keys():
                    own.write(_bytes_of(tensors[name].detach().cpu()), place[name])
                where = {"file": str(file.absolute()), "place": {name: place[name] for name in spread}}
            where = _said_by_first(group, where)
            path = Path(where["file"])
            sees = group.is_first or path.is_file()
            all_see = [bool(seen) for seen in group.all_gather(torch.tensor([sees]))]
            with _Opened(path if sees else file) as there:
                for rank, rank_sees in enumerate(all_see):
                    for name, at in where["place"].items():
                        tensor = spread[name]
                        row_bytes = tensor.nbytes // max(tensor.n_rows, 1)
                        pieces = group.pieces(tensor.rows_R, tensor.n_rows, rank, sent=not rank_sees)
                        for first, piece in pieces:
                            there.write(_bytes_of(piece), at + first * row_bytes)
                os.fsync(there.handle)
        group.barrier()  # the file is whole


class _Opened:
    def __init__(self, file: Path):
        self.file = file

    def __enter__(self) -> _Opened:
        self.handle = os.open(self.file, os.O_WRONLY | os.O_CLOEXEC)
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self.handle)

    def write(self, content: Any, at: int) -> None:
        view = memoryview(content)
        while len(view):
            n_written = os.pwrite(self.handle, view, at)
            view, at = view[n_written:], at + n_written


def _layout(tensors: Mapping[str, Any]) -> tuple[dict[str, int], int, bytes]:
    """Where each tensor begins in the file, its size, and what stands before them: as safetensors has it, wide ones first."""
    header, end = dict[str, Any](), 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
        tensor, begin = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    return (
        {name: first + of["data_offsets"][0] for name, of in header.items()},
        first + end,
        len(text).to_bytes(8, "little") + text,
    )


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _said_by_first(group: Group, what: dict[str, Any]) -> dict[str, Any]:
    """That of rank 0."""
    text = torch.frombuffer(bytearray(json.dumps(what).encode()), dtype=torch.uint8)
    (n_bytes,) = group.broadcast_(torch.tensor([len(text)])).tolist()
    said = group.broadcast_(text if group.is_first else torch.empty(n_bytes, dtype=torch.uint8))
    return json.loads(bytes(said.tolist()))
