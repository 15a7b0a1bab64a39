"""Our models as files of other libraries."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from crosscode.config.hookpoints import layer_of
from crosscode.errors import InputError
from crosscode.files import check_can_be_made, check_is_no_link, check_may_be_filled, new_folder
from crosscode.interop.format import ABOUT, FORMATS, Format, write_about
from crosscode.interop.plain import CLT, COMPOUND, CROSSCODER, SINGLE, PlainCoder, from_model, metadata_of_one
from crosscode.interop.sets import is_set, of_set
from crosscode.models.base import BaseCrosscoder

log = logging.getLogger("crosscode")


def export(
    models: Sequence[BaseCrosscoder], to: str, path: Path, *, position: str | None = None, overwrite: bool = False
) -> Path:
    """See `BaseCrosscoder.export`. `models`: several for circuit-tracer, a transcoder for each layer."""
    made = writing_format(to)
    check_target(path, made, overwrite=overwrite)
    coders = [coder for model in models for coder in planned(model, position)]
    check_holds(made, coders)
    if len(coders) > 1:  # their metadata are read in the order of the files
        coders.sort(key=lambda coder: layer_of(coder.inputs[0][1]) or 0)
    for note in made.notes(coders):
        log.warning("export --to %s: %s", to, note)
    with new_folder(path, made.index) as folder:
        made.write(coders, folder)
        write_about(folder, coders)
        written = {file.name for file in folder.iterdir()}
    for file in path.iterdir():  # of a larger export that was replaced
        if file.name not in written and _is_ours(file, made):
            file.unlink()
    return path


def writing_format(name: str) -> Format:
    """The format of that name, if it can be written."""
    made: Format = FORMATS.build({"type": name})
    if not made.writes:
        can = ", ".join(each for each in FORMATS if FORMATS[each].writes)
        raise InputError(f"export --to {name}: this format is read alone; written are {can}")
    return made


def planned(model: BaseCrosscoder, position: str | None = None) -> list[PlainCoder]:
    """What an export of this model would be written from: one coder, or of a set of transcoders each. On the meta device it
    will do."""
    coder = from_model(model)
    if not is_set(coder):
        return [_at(coder, position)]
    layers = range(len(coder.parts)) if position is None else [_index(_position_names(coder), position)]
    return [of_set(coder, layer) for layer in layers]


def check_holds(made: Format, coders: Sequence[PlainCoder], *, complete: bool = True) -> None:
    """Raise `InputError` with the reason why these cannot be written, and what would work."""
    if any(coder.split is not None and coder.split.difference for coder in coders):
        raise InputError(
            f"export --to {made.type_name()}: the model reads the difference of two language models, which no file of another "
            "library says; share it by `crosscode push`"
        )
    refusal = (
        made.refusal(coders, complete=complete)
        if made.takes_several or len(coders) == 1
        else (
            f"holds one coder, and {len(coders)} are given; export each into a folder of its own (of a set, by --position)"
        )
    )
    if refusal:
        raise InputError(f"export --to {made.type_name()}: {refusal}")


def check_target(path: Path, made: Format, *, overwrite: bool) -> None:
    """Raise `InputError` for a folder that is not to be written into: only an earlier export may be replaced."""
    check_may_be_filled(path, "out")
    check_can_be_made(path, "out")
    check_is_no_link(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"out = {str(path)!r}: is no folder; name a new one")
    there = sorted(path.iterdir()) if path.is_dir() else []
    if there and not overwrite:
        raise InputError(f"out = {str(path)!r}: is there already; name a new folder, or add --overwrite")
    foreign = [file.name for file in there if not _is_ours(file, made)]
    if there and not foreign and not (path / ABOUT).is_file():
        raise InputError(f"out = {str(path)!r}: what is there is no export of ours (no {ABOUT}); name a new folder")
    if foreign:
        raise InputError(f"out = {str(path)!r}: {foreign[0]!r} in it is no part of such an export; name a new folder")


def _is_ours(file: Path, made: Format) -> bool:
    return (
        file.is_file() and not file.is_symlink() and bool(re.fullmatch(f"{made.files}|{re.escape(ABOUT)}", file.name))
    )


# ---- one position


def _at(coder: PlainCoder, position: str | None) -> PlainCoder:
    """One output position of a coder; a crosscoder or cross-layer transcoder that has but one is that anyway."""
    if coder.kind in (SINGLE, COMPOUND):
        if position is not None and coder.kind == COMPOUND:
            raise InputError(
                f"position = {position!r}: what a compound cross-layer transcoder writes there comes from several layers, so "
                "that it is no transcoder; export the whole --to circuit-tracer"
            )
        if position is not None:
            _index(_position_names(coder), position)
        return coder
    n_positions = coder.b_dec_XoDo[..., 0].numel()
    if position is None:
        return _slice(coder, 0) if n_positions == 1 else coder
    return _slice(coder, _index(_position_names(coder), position))


def _position_names(coder: PlainCoder) -> list[str]:
    return list(coder.metadata.get("output_positions") or map(str, range(coder.b_dec_XoDo[..., 0].numel())))


def _index(names: list[str], position: str) -> int:
    if position not in names:
        raise InputError(f"position = {position!r}: there is none of that name; there are {', '.join(names)}")
    return names.index(position)


def _slice(coder: PlainCoder, index: int) -> PlainCoder:
    if coder.kind == CROSSCODER:
        coder = coder.with_pre_bias(False) if coder.b_dec_XoDo[..., 0].numel() > 1 else coder
    part = coder.part
    W_enc_LXD, W_dec_LXD = _flat(part.W_enc_LXiDi, 1), _flat(part.W_dec_LXoDo, 1)
    index_in = index if coder.kind == CROSSCODER else 0
    _warn_of_others(W_enc_LXD, index_in)
    skip = part.W_skip_XiDiXoDo
    if skip is not None:
        skip = skip.reshape(W_enc_LXD.shape[1], coder.d_in, -1, coder.d_out)[index_in, :, index]
    width = coder.widths.flat_X[index]
    W_enc_LD, W_dec_LD = (
        W_enc_LXD[:, index_in, : width if coder.kind == CROSSCODER else None],
        W_dec_LXD[:, index, :width],
    )
    narrowed = replace(part, W_enc_LXiDi=W_enc_LD, W_dec_LXoDo=W_dec_LD, W_skip_XiDiXoDo=skip)
    return replace(
        coder,
        kind=SINGLE,
        parts=(narrowed,),
        b_dec_XoDo=_flat(coder.b_dec_XoDo, 0)[index, :width],
        options={},
        metadata=metadata_of_one(coder, index, 0 if coder.kind == CLT else None),
        scaling_Xo=None if coder.scaling_Xo is None else coder.scaling_Xo.flatten()[index],
    )


def _flat(tensor: Tensor, before: int) -> Tensor:
    """The axes between `before` leading ones and the last one as one."""
    return tensor.reshape(*tensor.shape[:before], -1, tensor.shape[-1])


def _warn_of_others(W_enc_LXD: Tensor, index: int) -> None:
    others = [x for x in range(W_enc_LXD.shape[1]) if x != index]
    if others and not W_enc_LXD.is_meta and bool(W_enc_LXD[:, others].any()):
        log.warning(
            "position: the latents of a crosscoder read all its positions; the SAE of one gives what the crosscoder gives "
            "where the others are 0"
        )
