"""Nested training state on disk: tensors in safetensors, everything else in JSON. Never pickles."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from crosscode.errors import InputError
from crosscode.files import write_json
from crosscode.formats import STATE, STATE_TENSORS
from crosscode.stored import TrainerState, check, read_json
from crosscode.weight_files import SpreadTensor, save_tensors

STATE_JSON = "trainer_state.json"
STATE_FILES = (STATE_JSON, STATE_TENSORS)
_TENSOR_KEY = "__tensor__"
_FLOAT_KEY = "__float__"  # JSON has no word for what is not finite


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write dicts, lists, tuples, tensors, numbers, strings and None. Tuples come back as lists."""
    tensors: dict[str, torch.Tensor | SpreadTensor] = {}

    def strip(value: Any, path: str) -> Any:
        if isinstance(value, (torch.Tensor, SpreadTensor)):
            tensors[path] = value
            return {_TENSOR_KEY: path}
        if isinstance(value, dict):
            # Integer keys (optimizer states have them) would come back as strings.
            return {"__items__": [[key, strip(item, f"{path}/{key}")] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return [strip(item, f"{path}/{i}") for i, item in enumerate(value)]
        if isinstance(value, float) and not math.isfinite(value):
            return {_FLOAT_KEY: str(value)}
        return value

    stripped = strip({**STATE.stamp(), **state}, "")
    save_tensors(tensors, folder / STATE_TENSORS)
    write_json(folder / STATE_JSON, stripped)


def read_state(folder: Path) -> dict[str, Any]:
    """What `write_state` wrote, tensors on the CPU.

    Raises:
        InputError: it is of a version that is not read, or not as `write_state` writes it.
    """
    try:
        tensors = load_file(folder / STATE_TENSORS)
    except SafetensorError as error:
        raise InputError(f"{folder / STATE_TENSORS}: damaged ({error})") from error
    return _restored(folder, tensors.__getitem__)


def check_state(folder: Path) -> dict[str, Any]:
    """The state of a trainer without its tensors, none of which is read.

    Raises:
        InputError: it is not as a trainer leaves it.
    """
    try:
        with safe_open(folder / STATE_TENSORS, "pt") as file:
            names = set(file.keys())
    except SafetensorError as error:
        raise InputError(f"{folder / STATE_TENSORS}: damaged ({error})") from error
    return check(_restored(folder, dict.fromkeys(names).__getitem__), TrainerState, str(folder / STATE_JSON))


def _restored(folder: Path, tensor: Callable[[str], Any]) -> dict[str, Any]:
    file = folder / STATE_JSON

    def restore(value: Any) -> Any:
        if isinstance(value, dict):
            if _TENSOR_KEY in value:
                return tensor(value[_TENSOR_KEY])
            if _FLOAT_KEY in value:
                return float(value[_FLOAT_KEY])
            return {key: restore(item) for key, item in value["__items__"]}
        if isinstance(value, list):
            return [restore(item) for item in value]
        return value

    stripped = read_json(file, dict[str, Any])
    try:
        return STATE.read(check(restore(stripped), dict[str, Any], str(file)), str(file))
    except (KeyError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: not as a trainer writes it ({type(error).__name__}: {error})") from error
