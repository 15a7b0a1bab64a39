"""Sets of transcoders, one for each layer: one model of ours, and as many coders to other libraries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from crosscode.errors import InputError
from crosscode.interop.plain import COMPOUND, SINGLE, PlainCoder, PlainPart, metadata_of_one


def is_set(coder: PlainCoder) -> bool:
    return coder.kind == COMPOUND and not coder.options.get("later_layers", True)


def of_set(coder: PlainCoder, layer: int) -> PlainCoder:
    """The transcoder of one layer."""
    part = coder.parts[layer]
    skip = part.W_skip_XiDiXoDo
    return replace(
        coder,
        kind=SINGLE,
        parts=(
            replace(part, W_dec_LXoDo=part.W_dec_LXoDo[:, 0], W_skip_XiDiXoDo=None if skip is None else skip[:, 0]),
        ),
        b_dec_XoDo=coder.b_dec_XoDo[layer],
        metadata=metadata_of_one(coder, layer, layer),
        options={},
        scaling_Xo=None if coder.scaling_Xo is None else coder.scaling_Xo[layer],
    )


def as_set(coders: Sequence[PlainCoder], where: str) -> PlainCoder:
    """Transcoders in the order of their layers as one coder. `where` is what they were read from.

    Raises:
        InputError: they differ in their sizes or activations.
    """
    coders = _with_one_activation([coder.with_pre_bias(False) for coder in coders])
    first = coders[0]
    sizes = {(coder.part.n_latents, coder.d_in, coder.d_out, coder.part.kind) for coder in coders}
    if len(sizes) > 1:
        raise InputError(
            f"{where}: holds {len(coders)} transcoders of different latents, widths or activations; name the file of one"
        )
    has_skip, metadata = any(coder.has_skip for coder in coders), {**first.metadata, "architecture": COMPOUND}
    if all(coder.inputs for coder in coders):
        metadata["hookpoints"] = [c.inputs[0][1] for c in coders] + [c.outputs[0][1] for c in coders]
        metadata["widths"] = [[c.d_in for c in coders] + [c.d_out for c in coders]]
        metadata["output_positions"] = [name for c in coders for name in c.metadata.get("output_positions") or []]
    return replace(
        first,
        kind=COMPOUND,
        parts=tuple(_layer(coder, has_skip) for coder in coders),
        b_dec_XoDo=torch.stack([coder.b_dec_XoDo for coder in coders]),
        pre_bias=False,
        metadata=metadata,
        options={"later_layers": False},
    )


def _with_one_activation(coders: list[PlainCoder]) -> list[PlainCoder]:
    """A ReLU beside thresholds is a threshold of 0."""
    if {coder.part.kind for coder in coders} != {"relu", "jumprelu"}:
        return coders

    def thresholded(part: PlainPart) -> PlainPart:
        zeros_L = torch.zeros(part.n_latents)
        return replace(part, activation={"type": "jumprelu"}, theta_L=zeros_L) if part.kind == "relu" else part

    return [replace(coder, parts=(thresholded(coder.part),)) for coder in coders]


def _layer(coder: PlainCoder, has_skip: bool) -> PlainPart:
    part, skip = coder.part, coder.part.W_skip_XiDiXoDo
    if has_skip and skip is None:
        skip = torch.zeros(coder.d_in, coder.d_out)
    return replace(part, W_dec_LXoDo=part.W_dec_LXoDo[:, None], W_skip_XiDiXoDo=None if skip is None else skip[:, None])
