"""What the JumpReLU penalties need of a model."""

from __future__ import annotations

from crosscode.errors import InputError
from crosscode.models.base import BaseCrosscoder


def require_jumprelu(term: str, model: BaseCrosscoder) -> None:
    for activation in model.activation_fns:
        if activation.log_thresholds_L() is None:
            raise InputError(
                f"objective.{term}: a penalty of JumpReLU models, but crosscoder.activation.type = "
                f"{activation.type_name()!r}; use crosscoder.activation.type = 'jumprelu' or leave {term!r} out"
            )
