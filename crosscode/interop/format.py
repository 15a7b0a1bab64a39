"""What a format of another library is, and how its files are read: never with pickle."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from crosscode.config.registry import Configured, Registry
from crosscode.errors import InputError, first_line
from crosscode.files import write_json
from crosscode.interop.plain import CROSSCODER, PlainCoder
from crosscode.stored import parse_json
from crosscode.weight_files import save_tensors

Tensors = dict[str, Tensor]
_CONVERT = "`crosscode convert RUN --activation jumprelu` gives it thresholds, which this format holds"


def instead_of(kind: str) -> str:
    """What to do about an activation that a format of thresholds does not hold."""
    return _CONVERT if kind == "topk" else "train with batch_topk or jumprelu, which have thresholds"


class Format(Configured, ABC):
    """One format. A subclass is one file in `formats`, whose `Config` has its name as `type`."""

    index: ClassVar[str] = ""
    """the file without which an export counts for nothing"""
    files: ClassVar[str] = ""
    """regular expression: names of the files that it writes"""
    writes: ClassVar[bool] = True
    takes_several: ClassVar[bool] = False
    """whether several coders go into one export"""

    def refusal(self, coders: Sequence[PlainCoder], *, complete: bool = True) -> str | None:
        """Why these cannot be held, and what would work; None: they can. Weights are not looked at: they may be on the meta
        device. `complete`: whether these are all that go into an export, or some of them."""
        raise NotImplementedError

    def notes(self, coders: Sequence[PlainCoder]) -> list[str]:
        """What is still wanted of coders that can be held, and what not all that reads them knows."""
        return []

    def write(self, coders: Sequence[PlainCoder], folder: Path) -> None:
        """Write files into an empty folder."""
        raise NotImplementedError

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """Whether a file or folder is of this format. Reads no tensors."""

    @abstractmethod
    def read(self, path: Path) -> list[PlainCoder]:
        """What is there: one coder, or where the format holds several of a kind, all of them in their order.

        Raises:
            InputError: something that ours cannot be, or a damaged file.
        """


FORMATS: Registry[Any] = Registry("format", "crosscode.interop.formats")
"""Formats by name."""


# ---- refusals that several formats share


def several_parts(coder: PlainCoder) -> str | None:
    """For formats of one encoder and one decoder vector for each latent."""
    names = [f"{name!r}" for name in coder.metadata.get("output_positions") or []]
    which = f" (one of {', '.join(names)})" if names else ""
    dims = tuple(coder.parts[0].W_enc_LXiDi.shape[1:-1]), tuple(coder.b_dec_XoDo.shape[:-1])
    if len(coder.parts) > 1:
        return "a compound cross-layer transcoder has an encoder for each layer; take circuit-tracer"
    if any(size != 1 for axis in dims for size in axis):
        other = ", or take dictionary-learning, which has crosscoders" if coder.kind == CROSSCODER else ""
        return f"the model has several positions {dims[0]} -> {dims[1]}: name one{which} with --position{other}"
    return None


def single(coder: PlainCoder) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`W_enc_LD, W_dec_LD, b_dec_D, W_skip_DD` of a coder with one position on each side."""
    part = coder.part
    skip = part.W_skip_XiDiXoDo
    return (
        part.W_enc_LXiDi.reshape(part.n_latents, coder.d_in),
        part.W_dec_LXoDo.reshape(part.n_latents, coder.d_out),
        coder.b_dec_XoDo.reshape(coder.d_out),
        None if skip is None else skip.reshape(coder.d_in, coder.d_out),
    )


# ---- files


def write_tensors(file: Path, tensors: Tensors) -> None:
    """As safetensors, or for names in `.pt` as a state dict of torch."""
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    if file.suffix == ".pt":
        torch.save(tensors, file)
    else:
        save_tensors(tensors, file)


def read_tensors(file: Path, *needed: str) -> Tensors:
    """Tensors by name from a safetensors, `.pt` or `.npz` file; floating ones in float32.

    Raises:
        InputError: no such file, damaged, something else than tensors in it, or one of the `needed` is not there.
    """
    if not file.is_file():
        raise InputError(f"{file}: missing")
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                found = {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}
        elif file.suffix == ".safetensors":
            found = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever numpy, torch and safetensors raise at what is no such file
        why = first_line(error) if isinstance(error, SafetensorError) else "it is damaged, or holds more than tensors"
        raise InputError(f"{file}: cannot be read ({why})") from error
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) and not x.is_complex() for x in found.values()):
        raise InputError(f"{file}: holds something else than real tensors by name")
    missing = [name for name in needed if name not in found]
    if missing:
        raise InputError(f"{file}: lacks {', '.join(missing)}; it holds {', '.join(sorted(found))}")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object, as others write it: NaN and Infinity may stand in it."""
    return parse_json(file.read_text(encoding="utf-8"), dict[str, Any], str(file))


def peek(file: Path) -> dict[str, Any]:
    """The same for a look only: empty where there is no such thing."""
    try:
        return read_object(file)
    except (InputError, OSError, UnicodeDecodeError):
        return {}


def cannot(path: Path, why: str) -> NoReturn:
    raise InputError(f"import {str(path)!r}: {why}")


# ---- what of ours lies beside an export

ABOUT = "crosscode.json"
"""The saved model's metadata, beside the files of an export: other libraries pass over it."""


def write_about(folder: Path, coders: Sequence[PlainCoder]) -> None:
    write_json(folder / ABOUT, {"metadata": [dict(coder.metadata) for coder in coders]})


def read_about(folder: Path) -> list[dict[str, Any]]:
    """Metadata of each coder; empty for what others wrote."""
    found = peek(folder / ABOUT).get("metadata")
    return found if isinstance(found, list) and all(isinstance(each, dict) for each in found) else []


def known(architecture: str | None, model: str | None, *hookpoints: str | None, **facts: Any) -> dict[str, Any]:
    """Metadata from what a foreign file says: nothing, where it does not say the hookpoints."""
    hooks = [hook for hook in hookpoints if hook]
    names = [f"{(model or 'model').split('/')[-1]}/{hook}" for hook in hooks]
    metadata: dict[str, Any] = {} if architecture is None else {"architecture": architecture}
    if model:
        metadata["language_models"] = [{"path": model, "name": model.split("/")[-1], **facts}]
    if hooks:
        metadata |= {"hookpoints": hooks, "output_positions": names[-1:]}
    return metadata
