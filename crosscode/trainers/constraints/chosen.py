"""The constraints of a run: those that its config names, and those that its model implies."""

from __future__ import annotations

from collections.abc import Sequence

from crosscode.models.base import BaseCrosscoder
from crosscode.trainers.constraints.base import Constraint
from crosscode.trainers.constraints.hold_partition import HoldPartition
from crosscode.trainers.constraints.tie_shared_decoders import TieSharedDecoders


def constraints_for(model: BaseCrosscoder, configured: Sequence[Constraint] = ()) -> list[Constraint]:
    """All constraints of a run in the order in which they act on weights: those that a model implies, by shared latents or
    a partition, come first, so that others see the vectors as they will be."""
    implied: list[Constraint] = []
    for kind, needed in ((TieSharedDecoders, model.n_shared_latents), (HoldPartition, model.partition)):
        named = [constraint for constraint in configured if isinstance(constraint, kind)]
        implied += named or ([kind()] if needed else [])
    constraints = implied + [constraint for constraint in configured if constraint not in implied]
    for constraint in constraints:
        constraint.check_model(model)
    return constraints


def constrain(constraints: Sequence[Constraint], model: BaseCrosscoder) -> None:
    """Make all of them hold, in their order."""
    for constraint in constraints:
        constraint.after_step(model)
