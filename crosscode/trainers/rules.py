"""What training computes differently than it did when a run began: said where the run goes on."""

from __future__ import annotations

import logging

from crosscode.models.base import BaseCrosscoder

log = logging.getLogger("crosscode")

RULES = 2
"""Raised where what a step or a saved model computes changes; checkpoints hold it (earlier ones: 1)."""


def warn_of_changes(began_with: int, model: BaseCrosscoder) -> None:
    """Of what changed since the rules that a checkpoint was written by, name what touches this model."""
    changes = []
    if began_with < 2 and any(fn.selects_over_batch for fn in model.activation_fns):
        changes.append(
            "saved models have the threshold that lets through k latents a token on the last activations, and the "
            "running mean in between has no bias towards its start"
        )
    if began_with < 2 and model.n_shared_latents:
        changes.append(
            "penalties, grad_norm and train.clip_grad_norm count the vector of a shared latent once, not once a model"
        )
    if began_with < 2 and model.selects_over_parts:
        changes.append("among equal latents of several layers the lowest index is kept")
    for change in changes:
        log.warning("resume: an earlier version wrote the checkpoint; from here on %s", change)
