"""What a trainer saves in checkpoints and reads from them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from crosscode.errors import fitting
from crosscode.models.base import BaseCrosscoder
from crosscode.models.checkpoint import Scaling, read_weights_, write_model
from crosscode.runs.checkpoints import CheckpointNotSaved, Checkpoints
from crosscode.runs.state import read_state, write_state
from crosscode.trainers.recent import RecentActivations
from crosscode.trainers.rules import RULES

log = logging.getLogger("crosscode")


class Saver:
    """Checkpoints of a model and of the state of its training.

    Args:
        metadata: kept beside the weights.
        scaling: what the model's activations are multiplied with.
        recent: the last activations, by which saved thresholds are set.
        parts: all but these and the model that has a `state_dict`, by its name in checkpoints.
        evaluated: within it the model has the weights that are kept (`OptimizerPlan.evaluated`).
        max_shard_size: of a file with weights.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        model: BaseCrosscoder,
        metadata: dict[str, Any],
        scaling: Callable[[], Scaling],
        recent: RecentActivations,
        parts: Mapping[str, Any],
        evaluated: Callable[[], AbstractContextManager[None]],
        max_shard_size: str,
    ):
        self.checkpoints, self.model, self.metadata, self.scaling = checkpoints, model, metadata, scaling
        self.recent, self.parts = recent, {**parts, "recent": recent}
        self.saved_step, self.evaluated, self.max_shard_size = -1, evaluated, max_shard_size

    def save(self, counts: Mapping[str, float], *, or_warn: bool = False) -> None:
        """`checkpoints/step_N/`: the unfolded model, the state of all parts, and `counts`, of which one is `step`.

        Raises:
            CheckpointNotSaved: the disk refuses. With `or_warn` this is said, and training goes on: the disk may have
                room again for the next one.
        """
        state = {**counts, "rules": RULES, **{name: part.state_dict() for name, part in self.parts.items()}}

        def write(folder: Path) -> None:
            write_state(folder, state)
            with self.evaluated(), self.recent.settled():
                write_model(self.model, folder, self.metadata, self.scaling(), self.max_shard_size)

        try:
            self.checkpoints.save(state["step"], write)
            self.saved_step = state["step"]
        except CheckpointNotSaved as error:
            if not or_warn:
                raise
            log.warning("%s; training goes on", error)

    def load(self, step: int) -> dict[str, Any]:
        """Put everything back as it was at a checkpoint, which must be whole (`Checkpoints.newest_whole`); the state."""
        folder = self.checkpoints.run.checkpoint(step)
        read_weights_(self.model, folder)
        state = read_state(folder)
        for name, part in self.parts.items():
            with fitting(f"{folder}: the state of {name!r}"):
                part.load_state_dict(state[name])
        self.saved_step = step
        return state
