"""A grid of runs over one stream of activations: every batch is harvested once and trains all models in turn."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import replace
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import Tensor

from crosscode.build.equal_models import check_models_differ
from crosscode.build.experiment import open_experiment
from crosscode.build.heldout import AnyExperiment
from crosscode.build.replacing import check_may_begin
from crosscode.build.resume import ResumePoint, config_values
from crosscode.build.run import build_dataloader, build_trainer
from crosscode.build.schema import check_config
from crosscode.commands.parts.sweep_file import SWEEP_FILE, SweepFile
from crosscode.commands.parts.sweep_grid import GridPoint
from crosscode.config.experiment import ExperimentConfig
from crosscode.errors import CrosscodeError, InputError, at_field
from crosscode.evaluation.precision import float32_products
from crosscode.files import check_is_no_link, check_may_be_filled, is_temporary, remove, write_text
from crosscode.models.architecture import split_for
from crosscode.runs.directory import RunDirectory
from crosscode.runs.run_files import MARKER, read_marker, write_marker
from crosscode.stopping import Stopped, StopSignals
from crosscode.trainers.faults import NonFiniteLoss
from crosscode.trainers.opening import first_batch, next_batch, open_runs
from crosscode.trainers.progress import Progress
from crosscode.trainers.source import ActivationSource
from crosscode.trainers.trainer import Trainer

log = logging.getLogger("crosscode")


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


def run_sweep(points: Sequence[GridPoint], folder: Path, typed_overwrite: bool = False) -> list[dict[str, Any]]:
    """Train all points side by side; returns (and keeps in `sweep.json`) their labels, folders and summaries.

    Every run is what `crosscode train` makes of its config, to the bit, and is resumed like it. A run that fails
    leaves the sweep; the others go on. `typed_overwrite`: as of `build_trainer`.

    Raises:
        Interrupted: a signal came; all runs are saved, and `resume_sweep` goes on.
    """
    _check_free(points, folder, typed_overwrite)
    for point in points:
        split = split_for(point.config.crosscoder.type)
        split.check(*point.config.n_positions())
        if split.difference != split_for(points[0].config.crosscoder.type).difference:
            raise InputError("sweep: 'diff_sae' scales activations as no other crosscoder.type does; sweep it alone")
    experiment = open_experiment(points[0].config)
    with closing(build_dataloader(experiment)) as data:
        check_models_differ(experiment, data.rows)
        rows = [
            {
                "run": point.label,
                "path": str(point.config.run_path()),
                "id": uuid4().hex,
                "config": config_values(point.config),
            }
            for point in points
        ]
        trainers = {
            point.label: _new_trainer(_at(experiment, point.config), data, row["id"], typed_overwrite)
            for point, row in zip(points, rows, strict=True)
        }
        return _train_side_by_side(trainers, data, SweepFile(folder, rows), held=False)


def _new_trainer(experiment: AnyExperiment, data: ActivationSource, run_id: str, typed_overwrite: bool) -> Trainer:
    stream = SharedStream(data)
    return build_trainer(
        experiment, data=stream, progress=False, typed_overwrite=typed_overwrite, made_by="sweep", run_id=run_id
    )


def resume_sweep(folder: Path, trust_remote_code: bool = False) -> list[dict[str, Any]]:
    """Go on with the runs of an interrupted sweep that are neither done nor failed, each from its newest checkpoint.

    The stream starts where the run is that is furthest behind; others join in when it reaches them.
    """
    with RunDirectory(folder).held() if folder.is_dir() else nullcontext():
        file = SweepFile.open(folder)
        _remove_temporaries(folder)
        return _resume_sweep(file, trust_remote_code)


def _resume_sweep(file: SweepFile, trust_remote_code: bool) -> list[dict[str, Any]]:
    for label in file.rows:  # finished by `crosscode train --resume`, or just before a kill
        if file.is_made(label) and (file.path(label) / "summary.json").is_file():
            file.note(label, **RunDirectory(file.path(label)).read_summary())
    labels = file.unfinished()
    points = {label: ResumePoint.find(file.path(label), trust_remote_code) for label in labels if file.is_made(label)}
    configs = {label: points[label].config if label in points else _config_of(file, label) for label in labels}
    log.info("sweep: %s, %d to go on with", file.state(), len(labels))
    if not labels:
        return list(file.rows.values())
    experiment = open_experiment(configs[labels[0]])
    with closing(build_dataloader(experiment)) as data:
        trainers: dict[str, Trainer] = {}
        streams = {label: SharedStream(data) for label in points}
        for label, config in configs.items():
            own = _at(experiment, config)
            if label in points:
                trainers[label] = build_trainer(own, resume=points[label], data=streams[label], progress=False)
            else:
                trainers[label] = _new_trainer(own, data, file.rows[label]["id"], typed_overwrite=True)
        behind = min(trainers, key=lambda label: trainers[label].step)
        state = streams[behind].loaded if behind in streams else None
        if state is not None:
            data.load_state_dict(state)
        return _train_side_by_side(trainers, data, file, held=True)


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


def _config_of(file: SweepFile, label: str) -> ExperimentConfig:
    """Of a run that was about to be made, or to replace another, when a process ended."""
    with at_field(str(file.folder / SWEEP_FILE)):
        config = check_config(file.rows[label]["config"])
    return config.model_copy(update={"run_dir": str(file.path(label)), "overwrite": True})


def _at(experiment: AnyExperiment, config: ExperimentConfig) -> AnyExperiment:
    split = split_for(config.crosscoder.type)
    return replace(experiment, config=config, split=split)  # pyright: ignore[reportArgumentType]  # each is a dataclass


def _train_side_by_side(
    trainers: dict[str, Trainer], data: ActivationSource, file: SweepFile, *, held: bool
) -> list[dict[str, Any]]:
    running = trainers
    n_steps = next(iter(running.values())).n_steps
    position = min(trainer.step for trainer in running.values())
    with StopSignals() as stop, Progress(n_steps) as bar, ExitStack() as runs:
        go_on = f"crosscode sweep --resume {file.folder}"
        try:
            batches, acts_BMPD = first_batch(list(running.values()), data, position)
        except Stopped:
            raise stop.interrupted(position, n_steps, go_on) if held else Stopped from None
        _open(list(running.values()), file, runs, held=held)
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
            with suppress(Stopped):
                acts_BMPD = next_batch(list(running.values()), batches, position) if running else None
        for label, trainer in list(running.items()):
            if stop.received:
                break
            with suppress(Stopped):
                _each(running, file, partial(_finish, file, label), {label: trainer})
                running.pop(label, None)
        if stop.received and running:
            _each(running, file, methodcaller("save_and_close"))
            raise stop.interrupted(position, n_steps, go_on, f" ({file.state()})")
    return list(file.rows.values())


def _open(trainers: list[Trainer], file: SweepFile, runs: ExitStack, *, held: bool) -> None:
    """Say what will be made, then make it: from wherever a process ends, `resume_sweep` goes on. `held`: the sweep's
    folder is already."""
    sweep = RunDirectory(file.folder)
    if not held:
        runs.enter_context(sweep.held())
        _remove_temporaries(file.folder)
    paths = [file.folder / MARKER, file.folder / SWEEP_FILE]
    kept = {path: path.read_text(encoding="utf-8") if path.is_file() else None for path in paths}
    write_marker(file.folder, "sweep")
    file.save()
    try:
        open_runs(trainers, runs)
    except Exception:
        for path, text in kept.items():
            remove(path) if text is None else write_text(path, text)
        sweep.undo()
        raise
    file.all_made()


def _remove_temporaries(folder: Path) -> None:
    """What a process that was killed left half written, beside the runs."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_temporary(path):
            remove(path)


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
