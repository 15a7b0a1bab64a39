"""Objectives from what a config would say, and contexts to call them in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from crosscode.objectives import LossContext, Objective, objective_from
from crosscode.registry import Component


def _objective(config: dict[str, dict[str, Any]]) -> Objective:
    return objective_from({name: Component(type=name, **fields) for name, fields in config.items()})


@pytest.fixture
def objective() -> Callable[..., Objective]:
    return _objective


@pytest.fixture
def context() -> Callable[..., LossContext]:
    """`context(case, tokens_since_fired_L)`: one training forward pass."""

    def make(case: Any, tokens_since_fired_L: torch.Tensor | None = None) -> LossContext:
        if tokens_since_fired_L is None:
            tokens_since_fired_L = torch.zeros(case.model.n_latents, dtype=torch.int64)
        result = case.model.forward_train(case.input_BXiDi)
        return LossContext(case.model, case.input_BXiDi, case.target_BXoDo, result, tokens_since_fired_L)

    return make
