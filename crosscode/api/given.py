"""What was passed to `crosscode.train` in Python -> the values of a config, with what is usual where nothing was said.

Axes: B tokens · M models · P hookpoints · D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from crosscode.build.around import section_of_model
from crosscode.build.arrays import GivenArrays
from crosscode.config.experiment import DEFAULT_ARCHITECTURE, TrainConfig
from crosscode.data.arrays.in_order import ParquetInput
from crosscode.data.arrays.opening import open_input
from crosscode.data.arrays.random_access import ArrayInput, FileInput, StoreInput, check_has_rows
from crosscode.data.text.tokenizers import load_tokenizer
from crosscode.errors import InputError
from crosscode.models import ACTIVATIONS, ARCHITECTURES, BaseCrosscoder
from crosscode.models.architecture import split_for

FEWEST_STEPS = 1000
_READ_AHEAD = 4
_TANH_WEIGHT_PER_NUMBER = 1 / 640
"""So are the recipes' weights (0.1 at 64 numbers), and the term's default at 6400."""


def given_arrays(acts: Any, heldout: Any = None, tokens: Any = None, tokenizer: Any = None) -> GivenArrays:
    """Inputs from what a user has: one with all positions, or a list with one for each."""
    if isinstance(tokenizer, (str, Path)):
        tokenizer = _named_tokenizer(str(tokenizer))
    if tokens is not None:
        tokens = tokens.cpu() if isinstance(tokens, Tensor) else torch.from_numpy(np.asarray(tokens))
    return GivenArrays(_inputs(acts), None if heldout is None else _inputs(heldout), tokens, tokenizer)


def _named_tokenizer(name: str) -> Any:
    try:
        found = load_tokenizer(name, {"revision": None})
    except (OSError, ValueError) as error:
        raise InputError(
            f"tokenizer = {name!r}: cannot be loaded ({next(iter(str(error).splitlines()), '')})"
        ) from error
    if found is None:
        raise InputError(f"tokenizer = {name!r}: there is no tokenizer")
    return found


def _inputs(acts: Any) -> list[ArrayInput]:
    if isinstance(acts, (list, tuple)):
        if not acts:
            raise InputError("acts: an empty list; give one input for each position")
        return [open_input(one) for one in acts]
    return [open_input(acts)]


def source_of(given: GivenArrays, names: Sequence[Any] | None) -> dict[str, Any]:
    """The section `data.source`."""
    files = [_file(one) for one in given.inputs]
    heldout = [_file(one) for one in given.heldout or ()]
    return {
        "type": "arrays",
        "files": files if None not in files and None not in heldout else [],
        "heldout_files": heldout if None not in heldout else [],
        "names": names_of_positions(given.inputs, names),
        "origin": ", ".join(one.origin for one in given.inputs),
    }


def _file(one: ArrayInput) -> dict[str, Any] | None:
    if isinstance(one, StoreInput):
        return {"path": str(one.store.path)}
    if isinstance(one, (FileInput, ParquetInput)):
        return {"path": str(one.path), "key": one.key}
    return None


def names_of_positions(inputs: Sequence[ArrayInput], names: Sequence[Any] | None) -> list[list[str]]:
    """`[M][P]` names. Those that are given in one list may say which models there are: "base/resid", "tuned/resid".

    Raises:
        InputError: not one name for each position.
    """
    check_has_rows(inputs[0].origin, (inputs[0].n_rows or 0, *inputs[0].row_shape))
    *positions, _ = inputs[0].row_shape
    shape = (positions[0], positions[1]) if len(positions) == 2 else (1, int(np.prod(positions)) * len(inputs))
    n_positions = shape[0] * shape[1]
    if names is None:
        if n_positions == 1:
            return [["acts"]]
        hooks = [f"position {p}" for p in range(shape[1])]
        return [[f"model {m}/{hook}" if shape[0] > 1 else hook for hook in hooks] for m in range(shape[0])]
    flat = [name for one in names for name in ([one] if isinstance(one, str) else one)]
    if len(flat) != n_positions:
        raise InputError(
            f"names: {len(flat)} were given ({', '.join(map(repr, flat))}), but acts have {n_positions} position(s)"
        )
    if len(positions) == 2:
        return [flat[m * shape[1] : (m + 1) * shape[1]] for m in range(shape[0])]
    models: dict[str, list[str]] = {}
    for name in flat:
        models.setdefault(name.rpartition("/")[0], []).append(name)
    hooks = {tuple(name.rpartition("/")[2] for name in of_model) for of_model in models.values()}
    in_order = [name for of_model in models.values() for name in of_model] == flat
    return list(models.values()) if len(hooks) == 1 and in_order else [flat]


def usual_values(values: dict[str, Any], given: GivenArrays) -> dict[str, Any]:
    """A config's values with what is usual for this activation, architecture and number of rows, where nothing is said."""
    cc = dict(values["crosscoder"])
    cc.setdefault("type", DEFAULT_ARCHITECTURE)
    kind = section.get("type") if isinstance(section := cc.get("activation"), Mapping) else None
    activation = ACTIVATIONS[kind] if kind in list(ACTIVATIONS) else None
    if "init" not in cc:
        architecture = ARCHITECTURES.config_class(cc["type"])
        of_activation = activation.usual_init if activation and architecture.takes_init_of_activation else None
        cc["init"] = {"type": of_activation or architecture.usual_init}
    values = {**values, "crosscoder": cc}
    if activation is not None:
        values.setdefault("objective", {name: _usual_term(name, cc["type"], given) for name in activation.usual_terms})
    n_rows = given.inputs[0].n_rows
    train = dict(values.get("train") or {})
    if n_rows is not None:
        batch_size = train.setdefault(
            "batch_size", min(TrainConfig.model_fields["batch_size"].default, 1 << (max(n_rows, 1).bit_length() - 1))
        )
        if isinstance(batch_size, int):
            train.setdefault("n_tokens", max(n_rows, FEWEST_STEPS * batch_size))
    elif "n_tokens" not in train:
        raise InputError(
            f"n_tokens: required, but not given: how many rows to train on, as nobody knows how many there are in "
            f"{given.inputs[0].origin}"
        )
    values["train"] = train
    data = dict(values.get("data") or {})
    for name in ("source", "heldout", "stores", "join", "cache"):
        if data.get(name):
            raise InputError(
                f"data.{name} = {data[name]!r}: is for runs that harvest; `acts` (and `heldout`) say all of it"
            )
    if any(one.is_saved for one in given.inputs):
        data.setdefault("prefetch", _READ_AHEAD)
    values["data"] = data
    return values


def _usual_term(name: str, architecture: str, given: GivenArrays) -> dict[str, Any]:
    """A term's own defaults, but for the weight of tanh: it must outweigh a squared error that is as large as the output
    is wide, and its default is that of wide models."""
    if name != "tanh":
        return {}
    *_, width = given.inputs[0].row_shape
    n_in_rows = int(np.prod(given.inputs[0].row_shape[:-1])) * len(given.inputs)
    n_positions = n_in_rows if split_for(architecture).keeps_models else max(1, n_in_rows - 1)
    return {"weight": {"type": "linear_ramp", "value": _TANH_WEIGHT_PER_NUMBER * n_positions * width}}


def section_of(crosscoder: Any, names_MP: list[list[str]], width: int) -> dict[str, Any]:
    """The section `crosscoder`: as given, or that of a model.

    Raises:
        InputError: neither; a model that is not initialised, whose scaling is folded in, or that reads other positions.
    """
    if isinstance(crosscoder, BaseModel):
        return crosscoder.model_dump(exclude_unset=True)
    if isinstance(crosscoder, Mapping):
        return dict(crosscoder)
    if not isinstance(crosscoder, BaseCrosscoder):
        raise InputError(
            f"crosscoder: {type(crosscoder).__name__}: must be the section of a config, such as "
            "{'type': 'sae', 'n_latents': 4096, 'activation': {'type': 'topk', 'k': 32}}, or an initialised model"
        )
    model = crosscoder
    model.check_initialised()
    if model.is_folded:
        raise InputError(
            "crosscoder: the model's scaling is folded in; to train it further, give finetune_from its folder"
        )
    return section_of_model(model, len(names_MP), len(names_MP[0]), width)
