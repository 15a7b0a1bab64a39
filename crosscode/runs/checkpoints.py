"""Checkpoints of a run: whole or not there, with checksums, a bounded number of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from crosscode.checksums import CHECKSUMS_FILE, write_checksums
from crosscode.errors import CrosscodeError, InputError
from crosscode.files import new_folder
from crosscode.models.checkpoint import find_model_damage, read_config
from crosscode.runs.directory import RunDirectory
from crosscode.runs.state import STATE_FILES, check_state
from crosscode.weight_files import WEIGHTS

log = logging.getLogger("crosscode")


class CheckpointNotSaved(CrosscodeError):
    """A checkpoint or the trained model could not be written; checkpoints before it are as they were."""


class Checkpoints:
    """`checkpoints/step_N/` of a run.

    Args:
        keep_last: how many of the newest are kept.
        keep_every: those at multiples of this step are kept for ever; None: none is.
    """

    def __init__(self, run: RunDirectory, keep_last: int = 2, keep_every: int | None = None):
        if keep_last < 1:
            raise InputError(f"train.keep_last = {keep_last}: must be at least 1")
        self.run, self.keep_last, self.keep_every = run, keep_last, keep_every

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Let `write` fill the folder of a step; older checkpoints go only once it is on disk.

        Raises:
            CheckpointNotSaved: the disk is full, or refuses for another reason. Nothing of the new one is left.
        """
        path = self.run.checkpoint(step)
        advice = f"free some disk space under {str(self.run.path)!r}, or set train.keep_last lower"
        last = f"the last one is {self.newest_name()}"
        with (
            saving(f"checkpoint of step {step}", f"{last}; {advice}"),
            new_folder(path, CHECKSUMS_FILE, WEIGHTS) as folder,
        ):
            write(folder)
            write_checksums(folder)
        self._rotate()
        self.run.drop_put_by()
        return path

    def newest_name(self) -> str:
        """The newest checkpoint, for messages."""
        steps = self.run.steps()
        return str(self.run.checkpoint(steps[-1])) if steps else "none"

    def newest_whole(self) -> int | None:
        """Step of the newest checkpoint that is whole; damaged newer ones are passed over with a warning, and so is one
        that a process at work here removes meanwhile.

        None where there is no checkpoint at all.

        Raises:
            InputError: there are some, and all are damaged.
        """
        steps = self.run.steps()
        damages = []
        for step in reversed(steps):
            damage = find_step_damage(self.run.checkpoint(step))
            if damage is None:
                return step
            if not self.run.checkpoint(step).exists():
                return self.newest_whole()
            damages.append(damage)
            log.warning("checkpoint %s is damaged (%s): falling back to the one before", step, damage)
        if damages:
            raise InputError(f"run: all checkpoints of {str(self.run.path)!r} are damaged: {'; '.join(damages)}")
        return None

    def _rotate(self) -> None:
        steps = self.run.steps()
        for step in steps[: -self.keep_last]:
            if not (self.keep_every and step % self.keep_every == 0):
                self.run.remove_checkpoint(step)


@contextmanager
def saving(what: str, advice: str) -> Iterator[None]:
    """Turn what a disk answers into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointNotSaved(f"{what} could not be written ({error}); {advice}") from error


def find_step_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    damage = find_model_damage(folder, STATE_FILES)
    if damage is not None:
        return damage
    try:
        read_config(folder)
        step = check_state(folder)["step"]
    except InputError as error:
        return str(error)
    return None if folder.name == f"step_{step}" else f"it is of step {step}"
