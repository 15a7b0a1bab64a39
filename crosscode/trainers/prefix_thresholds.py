"""Thresholds with which the prefixes of a nested dictionary stand alone.

Axes: B tokens · S prefixes · L latents · N stored entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from crosscode.models.activations.base import NEVER
from crosscode.models.base import BaseCrosscoder
from crosscode.models.prefixes import first_latents

MAX_CALIBRATED = 1 << 26
"""Most pre-activations that a calibration looks at."""


@torch.no_grad()
def calibrate_prefixes_(model: BaseCrosscoder, inputs: Iterable[Tensor]) -> None:
    """For each prefix and source layer of a model that keeps k latents of each token, set the threshold that lets through as many
    as the whole keeps of the prefix on these inputs. Other activations need none: they decide latent by latent, or by one
    threshold for all."""
    needing = [p for p, part in enumerate(model.parts) if part.prefix_thresholds_S is not None]
    if not needing:
        return
    n_kept: dict[tuple[int, int], Tensor | int] = {}
    positive: dict[tuple[int, int], list[Tensor]] = {}
    was_training, n_left = model.training, max(1, MAX_CALIBRATED // model.n_latents)
    everything = math.ceil(model.n_latents / model.parts[0].activation_fn.k)
    model.eval()
    for input_BXiDi in inputs:
        input_BXiDi = input_BXiDi[:n_left]
        n_left -= input_BXiDi.shape[0]
        kept = model.forward_train(input_BXiDi).latents_of_parts
        with model.k_multiplied(everything):
            candidates = model.forward_train(input_BXiDi).latents_of_parts
        for p in needing:
            for s, size in enumerate(model.parts[p].prefixes):
                n_kept[p, s] = (first_latents(kept[p], size).value > 0).sum() + n_kept.get((p, s), 0)
                value = first_latents(candidates[p], size).value
                positive.setdefault((p, s), []).append(value[value > 0])
        if n_left <= 0:
            break
    model.train(was_training)
    for (p, s), of_batches in positive.items():
        value_N, n, thresholds_S = torch.cat(of_batches), int(n_kept[p, s]), model.parts[p].prefix_thresholds_S
        assert thresholds_S is not None
        thresholds_S[s] = value_N.topk(n).values[-1] if n else NEVER
