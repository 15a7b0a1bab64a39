"""A model on disk: `model.safetensors` + `config.json`. Never pickles."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from crosscode_kernels import AnyBackend
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from crosscode.checksums import CHECKSUMS_FILE, find_damage, write_checksums
from crosscode.errors import InputError, first_line
from crosscode.files import new_folder, write_json
from crosscode.formats import MODEL
from crosscode.models.activations.base import ACTIVATIONS
from crosscode.models.architecture import class_of_kind
from crosscode.models.coder import Coder
from crosscode.stored import SavedModel, check, read_json

ModelT = TypeVar("ModelT", bound=Coder)

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
MODEL_FILES = (CONFIG_FILE, WEIGHTS_FILE)


def save_model(model: Coder, path: Path, metadata: dict[str, Any]) -> None:
    with new_folder(path, CONFIG_FILE) as folder:
        write_model(model, folder, metadata)
        write_checksums(folder)


def write_model(model: Coder, folder: Path, metadata: dict[str, Any]) -> None:
    """Write the two files into an existing folder."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    config = {**MODEL.stamp(), "model": model_config(model), "metadata": metadata}
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
    return config | ({"use_pre_bias": True} if model.use_pre_bias else {})


def read_config(path: Path) -> dict[str, Any]:
    """The content of a saved model's `config.json`."""
    try:
        config = read_json(path / CONFIG_FILE, dict[str, Any])
    except FileNotFoundError as error:
        raise InputError(
            f"model path {str(path)!r}: no {CONFIG_FILE} there; expected a folder written by `save`"
        ) from error
    where = str(path / CONFIG_FILE)
    return check(MODEL.read(config, where), SavedModel, where)


def check_undamaged(path: Path) -> None:
    """Raise `InputError` for a saved model that is not as it was written. Earlier versions left no checksums."""
    damage = find_damage(path, MODEL_FILES) if (path / CHECKSUMS_FILE).exists() else None
    if damage is not None:
        raise InputError(f"model path {str(path)!r}: damaged ({damage})")


def load_model(cls: type[ModelT], path: Path, *, backend: AnyBackend, device: torch.device) -> ModelT:
    spec = dict(read_config(path)["model"])
    check_undamaged(path)
    kind = spec.pop("kind")
    model_class = class_of_kind(kind)
    if model_class is None or cls not in model_class.__mro__:
        raise InputError(f"model path {str(path)!r}: holds a {kind!r} model, not a {cls.__name__}")
    is_folded, dtype = spec.pop("is_folded"), getattr(torch, spec.pop("dtype"))
    try:
        activation = ACTIVATIONS.build(spec.pop("activation"), n_latents=spec["n_latents"])
        model = model_class(**spec, activation_fn=activation, backend=backend, dtype=dtype)
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError, MemoryError) as error:  # fields or sizes of no such model
        raise InputError(f"{path / CONFIG_FILE}: no such model can be made ({first_line(error)})") from error
    if is_folded:
        for part in {model, *model.parts}:
            part.folded_scaling_in_Xi = torch.empty(part.in_dims, dtype=dtype)
            part.folded_scaling_out_Xo = torch.empty(part.out_dims, dtype=dtype)
    model.load_state_dict(_checked_tensors(path / WEIGHTS_FILE, model.state_dict()))
    return model.to(device).eval()


def _checked_tensors(file: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, after checking names, shapes and dtypes against the model's."""
    try:
        found = load_file(file)
    except FileNotFoundError as error:
        raise InputError(f"{file}: missing; a saved model has {WEIGHTS_FILE} beside {CONFIG_FILE}") from error
    except SafetensorError as error:
        raise InputError(f"{file}: damaged ({error})") from error
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is not part of this model" for name in found.keys() - expected.keys()]
    for name in sorted(expected.keys() & found.keys()):
        want, have = expected[name], found[name]
        if (want.shape, want.dtype) != (have.shape, have.dtype):
            problems.append(f"{name} is {have.dtype} {tuple(have.shape)}, expected {want.dtype} {tuple(want.shape)}")
    if problems:
        raise InputError(f"{file}: {'; '.join(sorted(problems))}")
    return found
