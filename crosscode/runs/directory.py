"""Where a run keeps its files. Layout: config.yaml, metrics.jsonl, summary.json, checkpoints/step_N/, final/;
`.crosscode` marks it (`run_files`)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from crosscode.checksums import CHECKSUMS_FILE
from crosscode.errors import InputError, readable
from crosscode.files import check_is_no_link, held, is_temporary, json_text, remove, write_json, write_text
from crosscode.runs.run_files import (
    ASIDE,
    CONFIG_FILE,
    LOCK_FILE,
    drop_aside,
    find_files,
    is_half_replaced,
    move_aside,
    read_marker,
    remove_files,
    restore,
    step_files,
    write_marker,
)
from crosscode.stopping import n_ranks
from crosscode.stored import SEAL, Checksums, Evaluation, Summary, read_json, seal_of
from crosscode.weight_files import WEIGHTS_FILE, has_weights, weights_digest

log = logging.getLogger("crosscode")

FIGURES = {"summary.json": Summary, "evaluation.json": Evaluation}


class RunDirectory:
    """Paths and small files of one run, the folder `path`. Nothing is written before `begin` or `reopen`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._start: Callable[[], None] = _nothing
        self._begun = False
        self._made: list[Path] = []

    @property
    def config_file(self) -> Path:
        """`config.yaml`."""
        return self.path / CONFIG_FILE

    @property
    def metrics_file(self) -> Path:
        """`metrics.jsonl`."""
        return self.path / "metrics.jsonl"

    @property
    def final(self) -> Path:
        """The folder of the trained model, scaling folded in."""
        return self.path / "final"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after a step."""
        return self.checkpoints / f"step_{step}"

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, ascending. A folder with none of our files is somebody else's."""
        found = self.checkpoints.glob("step_*") if self.checkpoints.is_dir() else []
        numbered = [path for path in found if path.name.removeprefix("step_").isdigit() and path.is_dir()]
        return sorted(int(path.name.removeprefix("step_")) for path in numbered if any(step_files(path)))

    def is_finished(self) -> bool:
        """Whether the trained model is there, and the figures that are written after it."""
        return has_weights(self.final) and all(
            (self.path / name).is_file() for name in ("final/config.json", "summary.json")
        )

    # ---- making, replacing

    def create(self, config_yaml: str) -> None:
        """Make the folder with its marker and `config.yaml` now.

        Raises:
            InputError: something is there already.
        """
        if self.path.is_dir() and any(self.path.iterdir()):
            raise InputError(f"run_dir: {str(self.path)!r} is not empty; choose another name")
        self.create_later(config_yaml, check=_nothing)
        with self.held():
            self.begin()

    def create_later(self, config_yaml: str, check: Callable[[], None], **facts: Any) -> None:
        """Let `begin` make the run, where `check` still allows it then, and put by the one that lies there. `facts`
        stand in its marker."""
        self._start = partial(self._create, config_yaml, check, facts)

    def reopen_later(self, step: int | None) -> None:
        """Let `begin` do what `reopen` does, unless another process has been at work here since now."""
        self._start = partial(self._reopen_as_seen, step, self.seen())

    def _reopen_as_seen(self, step: int | None, seen: Any) -> None:
        if self.seen() != seen:
            raise InputError(
                f"resume: another process has worked on {str(self.path)!r} meanwhile; look at it, and resume it again if "
                "it is not over"
            )
        self.reopen(step)

    def seen(self) -> Any:
        """What would be another if a process trained here, or replaced the run, meanwhile."""
        files = [self.config_file, self.path / "summary.json"]
        return self.steps(), [
            (file.stat().st_ino, file.stat().st_mtime_ns) if file.is_file() else None for file in files
        ]

    def begin(self) -> None:
        """Do what was put off until nothing can fail any more. To be called while the run is held."""
        start, self._start = self._start, _nothing
        start()

    def _create(self, config_yaml: str, check: Callable[[], None], facts: dict[str, Any]) -> None:
        check()
        left = find_files(self.path)
        self._begun = True
        if self.config_file.is_file() or (self.path / ASIDE).exists():
            move_aside(self.path)
        else:
            remove_files(self.path)
        if left.foreign:
            names = ", ".join(str(path) for path in left.foreign[:10]) + (", ..." if len(left.foreign) > 10 else "")
            log.info("run %s: what crosscode did not write stays: %s", self.path, names)
        write_marker(self.path, "run", **facts)
        write_text(self.config_file, config_yaml)
        self.say_what_is_put_by()

    def undo(self) -> None:
        """After a start that failed: what `begin` and `held` made goes, and the run that was there comes back."""
        if self._begun:
            remove_files(self.path)
            if (self.path / ASIDE).is_dir():
                restore(self.path)
            self._begun = False
        for path in self._made:
            if path.is_dir():
                if not any(path.iterdir()):
                    path.rmdir()
            else:
                path.unlink(missing_ok=True)

    def recover(self) -> None:
        """Put back the run that a process was replacing when it ended."""
        if is_half_replaced(self.path):
            log.warning("run %s: it was about to be replaced when a process ended; it is put back", self.path)
            restore(self.path)

    def say_what_is_put_by(self) -> None:
        """Log where the run that was here before lies."""
        if (self.path / ASIDE / CONFIG_FILE).is_file():
            log.info("run %s: the run before lies in %s until the first checkpoint", self.path, self.path / ASIDE)

    def drop_put_by(self) -> None:
        """This run can be resumed by now: the one before is not needed any more."""
        drop_aside(self.path)

    @contextmanager
    def held(self, patience: float = 0) -> Iterator[None]:
        """Within the block no other process may train here, or replace what is here. Ends with the process, if killed.
        Makes the folder. `patience`: seconds to wait for another.

        Raises:
            InputError: another one does; the lock is a link.
        """
        for folder in reversed([self.path, *self.path.parents]):
            if not folder.exists():
                folder.mkdir()
                self._made.insert(0, folder)
        file = self.path / LOCK_FILE
        check_is_no_link(file)
        if not file.exists():
            self._made.insert(0, file)
        with held(file, f"run_dir: another process is at work in {str(self.path)!r}", patience=patience):
            yield

    def check_not_held(self) -> None:
        """Raise `InputError` if another process trains here. Makes nothing."""
        if (self.path / LOCK_FILE).exists():
            with self.held(patience=10 if n_ranks() > 1 else 0):  # ranks look one after the other, and one recovers
                self.recover()

    def reopen(self, step: int | None) -> None:
        """Clear away what a killed process left half written, and set aside damaged checkpoints behind `step`: they
        must not count among those that are kept."""
        for later in self.steps():
            if later > (step or 0):
                self._set_aside(self.checkpoint(later), self.checkpoints / f"damaged_step_{later}")
        for path in find_files(self.path).ours:
            if is_temporary(path):
                remove(self.path / path)
        if step is not None or not (self.path / ASIDE / CONFIG_FILE).exists():
            self.drop_put_by()
        self.say_what_is_put_by()

    def _set_aside(self, old: Path, new: Path) -> None:
        new.mkdir(exist_ok=True)
        for file in step_files(new):
            remove(file)
        for file in step_files(old):
            file.rename(new / file.name)
        if not any(old.iterdir()):
            old.rmdir()

    def remove_checkpoint(self, step: int) -> None:
        """Its files; the folder as well, unless somebody else's lie in it."""
        folder = self.checkpoint(step)
        for file in step_files(folder):
            remove(file)
        if not any(folder.iterdir()):
            folder.rmdir()

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`, whole or not at all."""
        self._write_figures("summary.json", summary)

    def write_evaluation(self, evaluation: dict[str, Any]) -> None:
        """Write `evaluation.json`, whole or not at all."""
        self._write_figures("evaluation.json", evaluation)

    def _write_figures(self, name: str, figures: dict[str, Any]) -> None:
        values = json.loads(json_text({**figures, "of_model": self.model_digest()}))
        write_json(self.path / name, {**values, SEAL: seal_of(values)})

    def drop_figures(self) -> None:
        """Those of a model that is about to be another."""
        for name in FIGURES:
            (self.path / name).unlink(missing_ok=True)

    def model_digest(self) -> str | None:
        """That of the trained model's weights, as its checksums have it."""
        file = self.final / CHECKSUMS_FILE
        files = read_json(file, Checksums)["files"] if file.is_file() else {}
        return weights_digest(files)

    def has_final(self) -> bool:
        """Whether there is a trained model, whole or not."""
        return self.final.is_dir() and any(self.final.iterdir())

    def check_final(self) -> None:
        """Raise `InputError` where `final/` lacks its weights, or figures beside it are of another model."""
        if not has_weights(self.final):
            raise InputError(f"model path {str(self.final)!r}: damaged ({WEIGHTS_FILE} is missing)")
        self.check_figures()

    def check_figures(self) -> None:
        """Raise `InputError` where figures that can be read are of another model than lies in `final/`."""
        digest = self.model_digest()
        for name, kind in FIGURES.items():
            try:
                of_model = read_json(self.path / name, kind).get("of_model")
            except (InputError, FileNotFoundError):
                continue
            if None not in (digest, of_model) and of_model != digest:
                raise InputError(
                    f"run: {str(self.path / name)!r} is of another model than lies in {str(self.final)!r}: one of them "
                    "comes from another run; put its own back, or take the figures away"
                )

    def read_summary(self) -> dict[str, Any]:
        """What `summary.json` says; raises `InputError` where it is damaged."""
        return read_json(self.path / "summary.json", Summary)


def _nothing() -> None:
    pass


def open_run(path: str | Path) -> RunDirectory:
    """An existing run. Raises `InputError` if there is none, if another version wrote it, or if there are links in it."""
    run = RunDirectory(path)
    with readable(f"run: {str(path)!r}"):
        find_files(run.path)
        read_marker(run.path)
    if is_half_replaced(run.path):
        raise InputError(
            f"run: {str(path)!r} was about to be replaced when a process ended; `crosscode train --resume {path}` puts "
            "it back and goes on with it"
        )
    if not run.config_file.is_file():
        within = ", ".join(map(str, sorted(one.parent for one in run.path.glob("*/config.yaml"))[:3]))
        hint = f"; it holds runs: name one, such as {within}" if within else ""
        raise InputError(f"run: {str(path)!r} is not a run directory (no config.yaml there){hint}")
    return run
