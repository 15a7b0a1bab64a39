"""One input from whatever a user has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crosscode.data.arrays.in_order import BatchesInput, ParquetInput, chosen
from crosscode.data.arrays.random_access import (
    ArrayInput,
    FileInput,
    NumpyInput,
    StoreInput,
    TensorInput,
    numpy_dtype,
)
from crosscode.data.store.place import is_url
from crosscode.data.store.reader import ActivationCache
from crosscode.errors import InputError

_SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def open_input(given: Any, key: str | None = None) -> ArrayInput:
    """One of the inputs above from what a user has: a tensor, array, memory map, `ActivationCache`, path (of a
    safetensors, npy or parquet file, or of a store's folder), or anything that gives batches.

    Raises:
        InputError: something else, or a file that cannot be read.
    """
    if isinstance(given, torch.Tensor):
        return TensorInput(given)
    if isinstance(given, np.ndarray):
        return NumpyInput(given)
    if isinstance(given, ActivationCache):
        return StoreInput(given)
    if isinstance(given, str) and is_url(given):
        return StoreInput(ActivationCache(given))
    if isinstance(given, (str, Path)):
        return _open_path(Path(given).expanduser(), key)
    if isinstance(given, Iterable) and not isinstance(given, (bytes, dict)):
        return BatchesInput(given)
    raise InputError(
        f"acts: {type(given).__name__}: must be a tensor, array, memory map, path to a safetensors, npy or parquet file, "
        "store of activations, DataLoader, iterator of batches, or a list with one of these for each position"
    )


def _open_path(path: Path, key: str | None) -> ArrayInput:
    if not path.exists():
        raise InputError(f"{str(path)!r}: no such file or folder")
    if path.is_dir():
        return StoreInput(ActivationCache(path))
    openers: dict[str, Callable[[Path, str | None], ArrayInput]] = {
        ".safetensors": open_safetensors, ".npy": _open_npy, ".parquet": ParquetInput,
    }  # fmt: skip
    if path.suffix not in openers:
        raise InputError(f"{str(path)!r}: must end in one of {', '.join(openers)}, or be the folder of a store")
    return openers[path.suffix](path, key)


def open_safetensors(path: Path, key: str | None = None) -> FileInput:
    """A tensor of a safetensors file: `key`, or the only one of floating-point numbers with two axes or more."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length >= 100 << 20:
                raise ValueError(f"a header of {length} bytes")
            entries = json.loads(file.read(length))
        found = {name: entry for name, entry in entries.items() if entry.get("dtype") in _SAFETENSORS}
    except (ValueError, AttributeError) as error:
        raise InputError(f"{str(path)!r}: is no safetensors file ({type(error).__name__})") from error
    names = [name for name, entry in found.items() if len(entry["shape"]) >= 2]
    name = chosen(names, key, str(path), "tensor of floating-point numbers")
    entry = found[name]
    dtype, at = _SAFETENSORS[entry["dtype"]], 8 + length + entry["data_offsets"][0]
    return FileInput(path, at, dtype, tuple(entry["shape"]), name)


def _open_npy(path: Path, key: str | None) -> FileInput:
    if key is not None:
        raise InputError(f"{str(path)!r}: an npy file holds one array; leave key = {key!r} out")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{str(path)!r}: is no npy file of numbers ({error})") from error
    assert isinstance(array, np.memmap)
    if not array.flags.c_contiguous:
        raise InputError(f"{str(path)!r}: lies in Fortran order; save it with np.ascontiguousarray")
    return FileInput(path, array.offset, numpy_dtype(array.dtype, str(path)), array.shape)
