"""Where a run keeps its files. Layout: config.yaml, metrics.jsonl, summary.json, checkpoints/step_N/, final/."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crosscode.errors import InputError
from crosscode.files import write_json, write_text

LOCK_FILE = "lock"


class RunDirectory:
    """Paths and small files of one run. Nothing is written before `create` or `reopen`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step}"

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, ascending."""
        found = self.checkpoints.glob("step_*") if self.checkpoints.is_dir() else []
        return sorted(int(p.name.removeprefix("step_")) for p in found if p.name.removeprefix("step_").isdigit())

    def check_free(self, overwrite: bool) -> None:
        """Raise `InputError` if a run is there already and may not be replaced."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"run_dir: {str(self.path)!r} is a file")
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        if not self.config_file.is_file():
            raise InputError(f"run_dir: {str(self.path)!r} is not empty and holds no run; choose another name")
        if not overwrite:
            raise InputError(
                f"run_dir: {str(self.path)!r} holds a run; go on with it by `crosscode train --resume {self.path}`, "
                "choose another name, or set overwrite: true"
            )

    def create(self, config_yaml: str, overwrite: bool) -> None:
        """Make the folder and write `config.yaml`, replacing an older run only if `overwrite`."""
        self.check_free(overwrite)
        if self.path.is_dir():
            with self.held():
                shutil.rmtree(self.path)
        self.path.mkdir(parents=True)
        write_text(self.config_file, config_yaml)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the block no other process may train here, or replace what is here. Ends with the process, if killed.

        Raises:
            InputError: another one does.
        """
        with (self.path / LOCK_FILE).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"run_dir: another process is training in {str(self.path)!r}") from error
            except OSError:
                pass  # a file system without locks
            yield

    def reopen(self, step: int | None) -> None:
        """Clear away what a killed process left half written, and set aside damaged checkpoints behind `step`: they
        must not count among those that are kept."""
        for later in self.steps():
            if later > (step or 0):
                _move_over(self.checkpoint(later), self.checkpoints / f"damaged_step_{later}")
        for folder in (self.path, self.checkpoints):
            for left in folder.glob(".*") if folder.is_dir() else []:
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_json(self.path / "summary.json", summary)

    def write_evaluation(self, evaluation: dict[str, Any]) -> None:
        write_json(self.path / "evaluation.json", evaluation)

    def read_summary(self) -> dict[str, Any]:
        return json.loads((self.path / "summary.json").read_text(encoding="utf-8"))


def _move_over(old: Path, new: Path) -> None:
    if new.exists():
        shutil.rmtree(new)
    old.rename(new)


def open_run(path: str | Path) -> RunDirectory:
    """An existing run.

    Raises:
        InputError: if there is none.
    """
    run = RunDirectory(path)
    if not run.config_file.is_file():
        raise InputError(f"run: {str(path)!r} is not a run directory (no config.yaml there)")
    return run
