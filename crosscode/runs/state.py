"""Nested training state on disk: tensors in safetensors, everything else in JSON. Never pickles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from crosscode.files import write_json
from crosscode.formats import STATE, STATE_TENSORS

STATE_JSON = "trainer_state.json"
_TENSOR_KEY = "__tensor__"


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write dicts, lists, tuples, tensors, numbers, strings and None. Tuples come back as lists."""
    tensors: dict[str, torch.Tensor] = {}

    def strip(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            # Clones: safetensors refuses tensors that share storage.
            tensors[path] = value.detach().cpu().contiguous().clone()
            return {_TENSOR_KEY: path}
        if isinstance(value, dict):
            # Integer keys (optimizer states have them) would come back as strings.
            return {"__items__": [[key, strip(item, f"{path}/{key}")] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return [strip(item, f"{path}/{i}") for i, item in enumerate(value)]
        return value

    stripped = strip({**STATE.stamp(), **state}, "")
    save_file(tensors, folder / STATE_TENSORS)
    write_json(folder / STATE_JSON, stripped)


def read_state(folder: Path) -> dict[str, Any]:
    """What `write_state` wrote, tensors on the CPU.

    Raises:
        InputError: it is of a version that is not read.
    """
    tensors = load_file(folder / STATE_TENSORS)

    def restore(value: Any) -> Any:
        if isinstance(value, dict):
            if _TENSOR_KEY in value:
                return tensors[value[_TENSOR_KEY]]
            return {key: restore(item) for key, item in value["__items__"]}
        if isinstance(value, list):
            return [restore(item) for item in value]
        return value

    state = restore(json.loads((folder / STATE_JSON).read_text(encoding="utf-8")))
    return STATE.read(state, str(folder / STATE_JSON))
