"""Files of other libraries as our models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from crosscode.errors import InputError, fitting, readable
from crosscode.interop.format import FORMATS, Format, read_about
from crosscode.interop.plain import CROSSCODER, PlainCoder, to_model
from crosscode.interop.sets import as_set
from crosscode.models.architecture import ARCHITECTURES
from crosscode.models.base import BaseCrosscoder


def load(path: Path) -> BaseCrosscoder | None:
    """The model of another library's file or folder; None: it is of no format that is known.

    Raises:
        InputError: damaged, or something that ours cannot be.
    """
    found = recognise(path)
    if found is None:
        return None
    return read(path, found)


def recognise(path: Path) -> Format | None:
    """The format of a file or folder, by its names and its config."""
    made = (FORMATS.build({"type": name}) for name in FORMATS) if path.exists() else ()
    return next((each for each in made if each.recognises(path)), None)


def read(path: Path, made: Format) -> BaseCrosscoder:
    """The model there, in eval mode, on the CPU; of the transcoders of several layers their set."""
    if not path.exists():
        raise InputError(f"import {str(path)!r}: no such file or folder")
    where = f"import {str(path)!r}"
    with readable(where), fitting(f"{where}: what is there"):
        coders = _with_own_metadata(path, made.read(path))
        coder = coders[0] if len(coders) == 1 else as_set(coders, where)
        try:
            return to_model(coder)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error


def _with_own_metadata(path: Path, coders: Sequence[PlainCoder]) -> list[PlainCoder]:
    """What our own export left beside its files says more than those do."""
    about = read_about(path) if path.is_dir() else []
    if len(about) != len(coders):
        return list(coders)
    return [_own(coder, metadata) for coder, metadata in zip(coders, about, strict=True)]


def _own(coder: PlainCoder, metadata: Mapping[str, Any]) -> PlainCoder:
    architecture = metadata.get("architecture")
    if architecture is None or ARCHITECTURES[architecture].kind != coder.kind:
        return coder
    coder = replace(coder, metadata=metadata)
    if coder.kind != CROSSCODER:
        return coder
    n_models, n_hookpoints = len(metadata.get("language_models") or []), len(metadata.get("hookpoints") or [])
    if n_models * n_hookpoints != coder.b_dec_XoDo[..., 0].numel():
        return coder
    dims, part = (n_models, n_hookpoints), coder.part
    part = replace(
        part,
        W_enc_LXiDi=part.W_enc_LXiDi.reshape(-1, *dims, coder.d_in),
        W_dec_LXoDo=part.W_dec_LXoDo.reshape(-1, *dims, coder.d_out),
    )
    scaling = None if coder.scaling_Xo is None else coder.scaling_Xo.reshape(dims)
    return replace(coder, parts=(part,), b_dec_XoDo=coder.b_dec_XoDo.reshape(*dims, -1), scaling_Xo=scaling)
