"""A model on disk: its weights (`weight_files`) and `config.json`. Never pickles."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from crosscode_kernels import AnyBackend, Backend
from safetensors import safe_open
from torch import Tensor

from crosscode.checksums import CHECKSUMS_FILE, find_damage, write_checksums
from crosscode.errors import InputError, first_line
from crosscode.files import new_folder, write_json
from crosscode.formats import MODEL, STATE_TENSORS
from crosscode.models.activations.base import ACTIVATIONS
from crosscode.models.architecture import class_of_kind, split_for
from crosscode.models.coder import Coder
from crosscode.models.elsewhere import elsewhere
from crosscode.models.folding import fold_scaling_
from crosscode.stored import SavedModel, check, read_json
from crosscode.weight_files import (
    MAX_SHARD_SIZE,
    WEIGHTS,
    read_tensor_,
    shape_and_dtype,
    tensor_files,
    weight_files,
    write_weights,
)

log = logging.getLogger("crosscode")

ModelT = TypeVar("ModelT", bound=Coder)

CONFIG_FILE = "config.json"
OF_MODELS = ("W_enc_LXiDi", "W_dec_LXoDo")
"""Weights of which a partition says something."""
Scaling = tuple[Tensor, Tensor]
"""`scaling_in_Xi, scaling_out_Xo`: what `fold_activation_scaling_into_weights_` takes."""


def save_model(model: Coder, path: Path, metadata: dict[str, Any], max_shard_size: int | str = MAX_SHARD_SIZE) -> None:
    with new_folder(path, CONFIG_FILE, WEIGHTS) as folder:
        write_model(model, folder, metadata, max_shard_size=max_shard_size)
        write_checksums(folder)


def write_model(
    model: Coder,
    folder: Path,
    metadata: dict[str, Any],
    scaling: Scaling | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Write weights and config into an existing folder, which is to have checksums. `scaling`: what the activations of an
    unfolded model in training are multiplied with, so that `load` can fold it."""
    write_weights(model.state_dict(), folder, max_shard_size)
    config = {**MODEL.stamp(), "has_checksums": True, "model": model_config(model), "metadata": metadata}
    if scaling is not None:
        config["scaling"] = [factors.tolist() for factors in scaling]
    write_json(folder / CONFIG_FILE, config)


def model_config(model: Coder) -> dict[str, Any]:
    """All that is needed to build a model again, without its weights."""
    part = model.parts[0]
    config = {
        "kind": model.kind,
        **{name: getattr(model, name) for name in model.own_arguments},
        "n_latents": model.n_latents,
        "activation": part.activation_fn.config.model_dump(),
        "use_encoder_bias": part.b_enc_L is not None,
        "use_decoder_bias": model.b_dec_XoDo is not None,
        "linear_skip": part.W_skip_XiDiXoDo is not None,
        "decoder_norm": model.decoder_norm,
        "dtype": str(model.dtype).removeprefix("torch."),
        "is_folded": model.is_folded,
    }
    partition = {} if model.partition is None else {"partition": model.partition.as_config()}
    if model.prefixes:
        config["prefixes"] = list(model.prefixes)
    return config | partition | model.widths.as_option() | ({"use_pre_bias": True} if model.use_pre_bias else {})


def model_from(spec: Mapping[str, Any], model_class: Any, backend: AnyBackend) -> Any:
    """A model as `model_config` describes it, its weights unset."""
    spec = {name: value for name, value in spec.items() if name != "kind"}
    is_folded, dtype = spec.pop("is_folded"), getattr(torch, spec.pop("dtype"))
    activation = ACTIVATIONS.build(spec.pop("activation"), n_latents=spec["n_latents"])
    model = model_class(**spec, activation_fn=activation, backend=backend, dtype=dtype)
    if is_folded:
        for part in {model, *model.parts}:
            part.folded_scaling_in_Xi = torch.empty(part.in_dims, dtype=dtype)
            part.folded_scaling_out_Xo = torch.empty(part.out_dims, dtype=dtype)
    return model


def read_config(path: Path) -> dict[str, Any]:
    """The content of a saved model's `config.json`."""
    try:
        config = read_json(path / CONFIG_FILE, dict[str, Any])
    except FileNotFoundError as error:
        raise InputError(
            f"model path {str(path)!r}: no {CONFIG_FILE} there; expected a folder written by `save`"
        ) from error
    except OSError as error:
        raise InputError(f"{path / CONFIG_FILE}: cannot be read ({error.strerror})") from error
    where = str(path / CONFIG_FILE)
    return check(MODEL.read(config, where), SavedModel, where)


def is_own(path: Path) -> bool:
    """Whether a folder is one that `save` wrote; other libraries have a `config.json` as well."""
    try:
        return MODEL.key in read_json(path / CONFIG_FILE, dict[str, Any])
    except FileNotFoundError:
        return False
    except (InputError, OSError):
        return path.is_dir()


def check_undamaged(path: Path) -> None:
    """Raise `InputError` for a saved model that is not as it was written. Earlier versions left no checksums, which is said."""
    if not (path / CHECKSUMS_FILE).exists() and not read_config(path).get("has_checksums"):
        log.warning("%s: no %s there: nothing tells whether the model is as it was written", path, CHECKSUMS_FILE)
        return
    damage = find_model_damage(path)
    if damage is not None:
        raise InputError(f"model path {str(path)!r}: damaged ({damage})")


def find_model_damage(path: Path, beside: Sequence[str] = ()) -> str | None:
    """What is wrong with a saved model that has checksums, or with the files `beside` it; or None."""
    try:
        files = weight_files(path)
    except (InputError, OSError) as error:
        return first_line(error)
    return find_damage(path, (CONFIG_FILE, *files, *beside))


def load_model(
    cls: type[ModelT],
    path: Path,
    *,
    backend: AnyBackend,
    device: torch.device,
    checked: bool = False,
) -> ModelT:
    """See `BaseCrosscoder.load`. `checked`: by `check_undamaged`, just now, which reads every byte."""
    if not path.exists() and elsewhere("is_repo")(str(path)):
        path = elsewhere("fetch")(str(path))
    foreign: Any = None if is_own(path) or not path.exists() else elsewhere("load")(path)
    if foreign is not None:
        if cls not in type(foreign).__mro__:
            raise InputError(f"model path {str(path)!r}: holds a {foreign.kind!r} model, not a {cls.__name__}")
        foreign.backend = Backend.parse(backend)
        return foreign.to(device).eval()
    config = read_config(path)
    if not checked:
        check_undamaged(path)
    spec, metadata = config["model"], config.get("metadata") or {}
    model_class = class_of_kind(spec["kind"])
    if model_class is None or cls not in model_class.__mro__:
        raise InputError(f"model path {str(path)!r}: holds a {spec['kind']!r} model, not a {cls.__name__}")
    try:
        model = model_from(spec, model_class, backend)
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError, MemoryError) as error:  # fields or sizes of no such model
        raise InputError(f"{path / CONFIG_FILE}: no such model can be made ({first_line(error)})") from error
    read_weights_(model, path)
    if model.partition is not None:
        model.partition.check_clear({f"{path}: {name}": model.get_parameter(name) for name in OF_MODELS})
    model.metadata, model.position_names = metadata, tuple(metadata.get("output_positions") or ())
    if not spec["is_folded"] and (scaling := _scaling_of(path, config)) is not None:
        fold_scaling_(model, *scaling)
    return model.to(device).eval()


def _scaling_of(path: Path, config: dict[str, Any]) -> Scaling | None:
    """What the activations of a checkpoint's model were multiplied with; None for a model that is no checkpoint."""
    if "scaling" in config:
        return torch.tensor(config["scaling"][0]), torch.tensor(config["scaling"][1])
    # Earlier checkpoints say it in the state of their data only.
    architecture = config["metadata"].get("architecture")
    state = path / STATE_TENSORS
    if architecture is None or not state.is_file():
        return None
    with safe_open(state, "pt") as tensors:
        name = "/data/scaling_MP"
        return split_for(architecture).scaling(tensors.get_tensor(name)) if name in tensors.keys() else None  # noqa: SIM118


def read_weights_(model: Coder, path: Path) -> None:
    """Fill a model, after checking names, shapes and dtypes against its own."""
    expected = model.state_dict()
    files = tensor_files(path)
    problems = [f"{name} is missing" for name in expected.keys() - files.keys()]
    problems += [f"{name} is not part of this model" for name in files.keys() - expected.keys()]
    for name in sorted(expected.keys() & files.keys()):
        (shape, dtype), want = shape_and_dtype(files[name], name), expected[name]
        if "activation_fn" in name and torch.promote_types(want.dtype, dtype) == want.dtype:
            dtype = want.dtype  # earlier, thresholds were as narrow as the weights
        if (tuple(want.shape), want.dtype) != (shape, dtype):
            problems.append(f"{name} is {dtype} {shape}, expected {want.dtype} {tuple(want.shape)}")
    if problems:
        raise InputError(f"{next(iter(files.values()), path)}: {'; '.join(sorted(problems))}")
    for name, file in files.items():
        read_tensor_(expected[name], file, name)
