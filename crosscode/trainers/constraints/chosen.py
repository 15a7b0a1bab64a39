"""The constraints of a run: those that its config names, and those that its model implies."""

from __future__ import annotations

from collections.abc import Sequence

from crosscode.models.base import BaseCrosscoder
from crosscode.trainers.constraints.base import Constraint
from crosscode.trainers.constraints.tie_shared_decoders import TieSharedDecoders


def constraints_for(model: BaseCrosscoder, configured: Sequence[Constraint] = ()) -> list[Constraint]:
    """All constraints of a run in the order in which they act on weights: tying, which shared latents imply, comes first,
    so that others see the vectors as they will be."""
    ties = [constraint for constraint in configured if isinstance(constraint, TieSharedDecoders)]
    if model.n_shared_latents and not ties:
        ties = [TieSharedDecoders()]
    constraints = ties + [constraint for constraint in configured if not isinstance(constraint, TieSharedDecoders)]
    for constraint in constraints:
        constraint.check_model(model)
    return constraints
