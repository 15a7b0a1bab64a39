"""Nested dictionaries (Matryoshka; Bussmann et al. 2025, arXiv:2503.17547): the first latents of a dictionary, which must
reconstruct alone.

Latents are selected once, over the whole dictionary; a prefix has those of them that lie below its size. In a compound model a
prefix has the first latents of every source layer, the same share of each.

Axes: B tokens · S prefixes · L latents · N stored entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from crosscode.errors import InputError
from crosscode.models import checkpoint
from crosscode.models.coder import Coder


def sizes_of(given: Sequence[float], n_latents: int, n_parts: int = 1) -> tuple[int, ...]:
    """Sizes in latents, of which each of `n_parts` source layers has its share, from numbers of latents or shares (below 1).

    Raises:
        InputError: they do not ascend, reach the whole dictionary or do not divide.
    """
    sizes = [n_parts * round(x * n_latents / n_parts) if x < 1 else x for x in given]
    for x, size in zip(given, sizes, strict=True):
        if size != int(size) or not 1 <= size < n_latents or size % n_parts:
            layers = f", a multiple of the {n_parts} source layers" if n_parts > 1 else ""
            raise InputError(
                f"prefixes: {x} gives {size:g} latents; must be a whole number from 1 to {n_latents - 1}{layers}, or such a share"
            )
    if sizes != sorted(set(sizes)):
        raise InputError(f"prefixes = {list(given)}: must ascend, got {[int(size) for size in sizes]} latents")
    return tuple(int(size) for size in sizes)


def prefix_of(model: Any, n_latents: int) -> Any:
    """See `BaseCrosscoder.prefix`."""
    (size,) = sizes_of([n_latents], model.n_latents, len(model.parts))
    n_own = size // len(model.parts)
    activations = [part.activation_fn.for_prefix(n_own, _threshold(part, n_own)) for part in model.parts]
    spec = checkpoint.model_config(model) | {
        "n_latents": size,
        "activation": activations[0].config.model_dump(),
        "prefixes": [smaller for smaller in model.prefixes if smaller < size],
    }
    prefix = checkpoint.model_from(spec, type(model), model.backend)
    weights = model.state_dict()
    state = {}
    for name, like in prefix.state_dict().items():
        if "activation_fn" not in name:
            state[name] = weights[name] if weights[name].shape == like.shape else weights[name][: like.shape[0]]
    prefix.load_state_dict(state, strict=False)
    for part, activation in zip(prefix.parts, activations, strict=True):
        part.activation_fn.load_state_dict(activation.state_dict())
    prefix.metadata, prefix.position_names = model.metadata, model.position_names
    return prefix.to(model.device).eval()


def _threshold(part: Coder, size: int) -> Tensor | None:
    """What was calibrated for a prefix; None: nothing."""
    if part.prefix_thresholds_S is None or size not in part.prefixes:
        return None
    threshold = part.prefix_thresholds_S[part.prefixes.index(size)]
    return threshold if bool(threshold >= 0) else None
