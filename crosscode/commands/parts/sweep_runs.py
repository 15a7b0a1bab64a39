"""A grid of runs over one stream of activations: every batch is harvested once and trains all models in turn."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

from torch import Tensor

from crosscode.build.experiment import open_experiment
from crosscode.build.heldout import AnyExperiment
from crosscode.build.replacing import check_may_begin
from crosscode.build.resume import ResumePoint
from crosscode.build.run import build_dataloader, build_trainer
from crosscode.commands.parts.sweep_grid import GridPoint
from crosscode.config.experiment import ExperimentConfig
from crosscode.errors import CrosscodeError, InputError, Interrupted
from crosscode.evaluation.precision import float32_products
from crosscode.files import check_is_no_link, check_may_be_filled, write_json
from crosscode.models.architecture import split_for
from crosscode.runs.directory import RunDirectory
from crosscode.runs.run_files import read_marker, write_marker
from crosscode.trainers.faults import NonFiniteLoss
from crosscode.trainers.interruption import StopSignals
from crosscode.trainers.opening import next_batch, open_runs
from crosscode.trainers.progress import Progress
from crosscode.trainers.source import ActivationSource
from crosscode.trainers.trainer import Trainer

log = logging.getLogger("crosscode")

SWEEP_FILE = "sweep.json"


# ---- what is known of each run


class SweepFile:
    """`sweep.json`: for each run its label and folder, and once it is over its summary, or the error that ended it."""

    def __init__(self, folder: Path, rows: Sequence[dict[str, Any]]):
        self.folder, self.rows = folder, {row["run"]: row for row in rows}

    @classmethod
    def open(cls, folder: Path) -> SweepFile:
        check_is_no_link(folder / SWEEP_FILE)
        try:
            rows = json.loads((folder / SWEEP_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"sweep: {str(folder)!r} holds no sweep (no {SWEEP_FILE} there)") from error
        except ValueError as error:
            raise InputError(f"sweep: {str(folder / SWEEP_FILE)!r} is damaged: {error}") from error
        return cls(folder, rows)

    def note(self, label: str, **facts: Any) -> None:
        row = self.rows[label]
        self.rows[label] = {"run": row["run"], "path": row["path"], **facts}
        self.save()

    def save(self) -> None:
        write_json(self.folder / SWEEP_FILE, list(self.rows.values()))

    def path(self, label: str) -> Path:
        """Where a run is now: the whole sweep may have been moved.

        Raises:
            InputError: that is no folder of its own in the sweep's, or a link.
        """
        path = self.folder / Path(self.rows[label]["path"]).name
        if path.name in ("", "..") or path == self.folder:
            raise InputError(f"sweep: {str(self.folder / SWEEP_FILE)!r}: {label}: no folder of a run is named")
        check_is_no_link(path)
        return path

    def unfinished(self) -> list[str]:
        """A run that met a loss that is not finite would meet it again; after other errors it can go on."""
        return [label for label, row in self.rows.items() if "step" not in row and row.get("resumable", True)]

    def state(self) -> str:
        n_failed = sum("error" in row for row in self.rows.values())
        n_done = sum("step" in row for row in self.rows.values())
        return f"{n_done} of {len(self.rows)} runs done" + (f", {n_failed} failed" if n_failed else "")


class SharedStream:
    """The one stream of a sweep, as each of its trainers sees it: only the sweep itself moves it."""

    def __init__(self, data: ActivationSource):
        self._data = data
        self.loaded: dict[str, Any] | None = None

    @property
    def scaling_MP(self) -> Tensor:
        return self._data.scaling_MP

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._data)

    def state_dict(self) -> dict[str, Any]:
        return self._data.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state

    def close(self) -> None:
        """Left to the sweep."""


# ---- running


def run_sweep(
    points: Sequence[GridPoint], folder: Path, progress: bool = True, typed_overwrite: bool = False
) -> list[dict[str, Any]]:
    """Train all points side by side; returns (and keeps in `sweep.json`) their labels, folders and summaries.

    Every run is what `crosscode train` makes of its config, to the bit, and is resumed like it. A run that fails
    leaves the sweep; the others go on. `typed_overwrite`: as of `build_trainer`.

    Raises:
        Interrupted: a signal came; all runs are saved, and `resume_sweep` goes on.
    """
    _check_free(points, folder, typed_overwrite)
    for point in points:
        split_for(point.config.crosscoder.type).check(*point.config.n_positions())
    experiment = open_experiment(points[0].config)
    with closing(build_dataloader(experiment)) as data:
        trainers: dict[str, Trainer] = {}
        for point in points:
            trainers[point.label] = build_trainer(
                _at(experiment, point.config),
                data=SharedStream(data),
                progress=False,
                typed_overwrite=typed_overwrite,
                made_by="sweep",
            )
        file = SweepFile(folder, [{"run": label, "path": str(trainer.run.path)} for label, trainer in trainers.items()])
        return _train_side_by_side(trainers, data, file, progress)


def resume_sweep(folder: Path, progress: bool = True, trust_remote_code: bool = False) -> list[dict[str, Any]]:
    """Go on with the runs of an interrupted sweep that are neither done nor failed, each from its newest checkpoint.

    The stream starts where the run is that is furthest behind; others join in when it reaches them.
    """
    file = SweepFile.open(folder)
    for label in file.rows:  # finished by `crosscode train --resume`, or just before a kill
        if (file.path(label) / "summary.json").is_file():
            file.note(label, **RunDirectory(file.path(label)).read_summary())
    points = {label: ResumePoint.find(file.path(label), trust_remote_code) for label in file.unfinished()}
    log.info("sweep: %s, %d to go on with", file.state(), len(points))
    if not points:
        return list(file.rows.values())
    experiment = open_experiment(next(iter(points.values())).config)
    with closing(build_dataloader(experiment)) as data:
        trainers: dict[str, Trainer] = {}
        streams = {label: SharedStream(data) for label in points}
        for label, point in points.items():
            own = _at(experiment, point.config)
            trainers[label] = build_trainer(own, resume=point, data=streams[label], progress=False)
        state = streams[min(trainers, key=lambda label: trainers[label].step)].loaded
        if state is not None:
            data.load_state_dict(state)
        return _train_side_by_side(trainers, data, file, progress)


def _check_free(points: Sequence[GridPoint], folder: Path, typed: bool) -> None:
    """Of a sweep that is there already only the runs of this one's names are replaced, each as `train` would do it."""
    check_may_be_filled(folder, "run_dir")
    marker = read_marker(folder)
    if folder.is_dir() and (marker or {}).get("kind", "sweep") != "sweep":
        raise InputError(f"run_dir: {str(folder)!r} holds a run; choose another --run-dir")
    check_is_no_link(folder / SWEEP_FILE)
    overwrite = points[0].config.overwrite
    if (folder / SWEEP_FILE).exists():
        file = SweepFile.open(folder)
        if not (typed or (overwrite and marker is not None and not file.unfinished())):
            how = "" if overwrite else " (or, where all runs are done, overwrite: true in the config)"
            raise InputError(
                f"sweep: {str(folder)!r} holds a sweep ({file.state()}); go on with it by "
                f"`crosscode sweep --resume {folder}`, choose another --run-dir, or replace it by --overwrite{how}"
            )
    for point in points:
        check_may_begin(point.config, typed)


def _at(experiment: AnyExperiment, config: ExperimentConfig) -> AnyExperiment:
    split = split_for(config.crosscoder.type)
    return replace(experiment, config=config, split=split)  # pyright: ignore[reportArgumentType]  # each is a dataclass


def _train_side_by_side(
    trainers: dict[str, Trainer], data: ActivationSource, file: SweepFile, progress: bool
) -> list[dict[str, Any]]:
    running = trainers
    n_steps = next(iter(running.values())).n_steps
    position = min(trainer.step for trainer in running.values())
    with StopSignals() as stop, Progress(n_steps, enabled=progress) as bar, ExitStack() as runs:
        batches = iter(data)
        acts_BMPD = next_batch(list(running.values()), batches, position)
        open_runs(list(running.values()), runs)
        write_marker(file.folder, "sweep")
        file.save()
        for trainer in running.values():
            trainer.start()
        bar.start(position)
        while position < n_steps and running and not stop.received:
            if acts_BMPD is None:
                log.warning("the data ended at step %d of %d: training stops", position, n_steps)
                _each(running, file, methodcaller("save_checkpoint"))
                break
            due = {label: trainer for label, trainer in running.items() if trainer.step == position}
            _each(running, file, methodcaller("train_step", acts_BMPD), due)
            position += 1
            bar.advance(next((trainer.metrics.last for trainer in running.values()), {}))
            if running and not stop.received:
                acts_BMPD = next_batch(list(running.values()), batches, position)
        for label, trainer in list(running.items()):
            if stop.received:
                break
            _each(running, file, partial(_finish, file, label), {label: trainer})
            running.pop(label, None)
        if stop.received and running:
            _each(running, file, methodcaller("save_and_close"))
            raise Interrupted(
                f"stopped by {stop.received} after step {position} of {n_steps} ({file.state()}); "
                f"continue with: crosscode sweep --resume {file.folder}"
            )
    return list(file.rows.values())


def _finish(file: SweepFile, label: str, trainer: Trainer) -> None:
    trainer.finish()
    file.note(label, **trainer.run.read_summary())


def _each(
    running: dict[str, Trainer],
    file: SweepFile,
    act: Callable[[Trainer], None],
    chosen: dict[str, Trainer] | None = None,
) -> None:
    """Let trainers act in turn. One that fails leaves the sweep; the others go on."""
    for label, trainer in list((running if chosen is None else chosen).items()):
        try:
            with float32_products(tf32=trainer.config.tf32):
                act(trainer)
        except CrosscodeError as error:
            log.error("%s: %s", label, error)
            file.note(label, error=str(error), resumable=not isinstance(error, NonFiniteLoss))
            del running[label]
