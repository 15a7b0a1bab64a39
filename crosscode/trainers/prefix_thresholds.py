"""Thresholds with which the prefixes of a nested dictionary stand alone.

Axes: B tokens · S prefixes · L latents · N stored entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack

import torch
from torch import Tensor

from crosscode.models.activations.base import NEVER
from crosscode.models.base import BaseCrosscoder

MAX_CALIBRATED = 1 << 26
"""Most pre-activations that a calibration looks at."""


@torch.no_grad()
def calibrate_prefixes_(model: BaseCrosscoder, inputs: Iterable[Tensor]) -> None:
    """For each prefix of a model that keeps k latents of each token or batch, set the threshold that lets through as many as
    training keeps of the prefix on these batches: one for each source layer, or one for all where k of all are kept. Other
    activations need none: they decide latent by latent."""
    if model.parts[0].prefix_thresholds_S is None:
        return
    n_kept: dict[tuple[int, int], Tensor | int] = {}
    ranked: dict[tuple[int, int], list[Tensor]] = {}
    was_training, n_left = model.training, max(1, MAX_CALIBRATED // model.n_latents)
    everything = math.ceil(model.n_latents / model.parts[0].activation_fn.k)
    with ExitStack() as stack:
        for activation in model.activation_fns:
            stack.enter_context(activation.annealing_over())
        model.train()
        for input_BXiDi in inputs:
            input_BXiDi = input_BXiDi[:n_left]
            n_left -= input_BXiDi.shape[0]
            kept = model.forward_train(input_BXiDi).latents_of_parts
            with model.k_multiplied(everything):
                candidates = model.forward_train(input_BXiDi).latents_of_parts
            for p, part in enumerate(model.parts):
                for s, size in enumerate(part.prefixes):
                    key = (0 if model.selects_over_parts else p, s)
                    n_kept[key] = (kept[p].slice_latents(0, size).value > 0).sum() + n_kept.get(key, 0)
                    rank = part.activation_fn.ranks(candidates[p].slice_latents(0, size), part.ranking_norms_L())
                    ranked.setdefault(key, []).append(rank[rank > 0])
            if n_left <= 0:
                break
    model.train(was_training)
    for (p, s), of_batches in ranked.items():
        rank_N, n = torch.cat(of_batches), int(n_kept[p, s])
        for part in model.parts if model.selects_over_parts else [model.parts[p]]:
            assert part.prefix_thresholds_S is not None
            part.prefix_thresholds_S[s] = rank_N.topk(n).values[-1] if n else NEVER
