"""A checked experiment -> a trainer: new, resumed or warm-started.

Axes: B tokens · M models · P hookpoints · D width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from crosscode.build.choices import with_choices
from crosscode.build.data import available_device
from crosscode.build.equal_models import check_models_differ
from crosscode.build.experiment import build_constraints, build_model, build_objective
from crosscode.build.heldout import AnyExperiment
from crosscode.build.replacing import check_may_begin
from crosscode.build.resume import ResumePoint, config_values
from crosscode.build.schema import dump_config
from crosscode.build.stores import check_stores_outside
from crosscode.config.data import DataConfig
from crosscode.config.experiment import ExperimentConfig
from crosscode.data.dataloader import ActivationsDataloader
from crosscode.errors import InputError, in_section
from crosscode.models import INITIALIZATIONS, BaseCrosscoder
from crosscode.models.checkpoint import read_config
from crosscode.parallel import joined
from crosscode.parallel.training import AlikeSource, SharedSource, follow, shard_
from crosscode.runs.directory import RunDirectory
from crosscode.runs.loggers import JsonlLogger, Logger
from crosscode.runs.loggers_extra import TensorboardLogger, WandbLogger
from crosscode.trainers.callbacks import Callback
from crosscode.trainers.constraints import Constraint
from crosscode.trainers.source import ActivationSource, as_source
from crosscode.trainers.trainer import Trainer
from crosscode.trainers.warm_start import warm_start

log = logging.getLogger("crosscode")


def build_trainer(
    experiment: AnyExperiment,
    *,
    resume: ResumePoint | None = None,
    data: ActivationSource | None = None,
    model: BaseCrosscoder | None = None,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
    progress: bool = True,
    typed_overwrite: bool = False,
    made_by: str = "train",
    run_id: str | None = None,
) -> Trainer:
    """Everything that `Trainer` is composed of. A new run's directory is made by the trainer itself, once it has its
    first batch: until then nothing is written.

    Args:
        resume: continue this run from its newest whole checkpoint (from the start, where it has none yet); `experiment`
            is that of the run's config.
        data: a stream of activations to use in place of the one that the config describes.
        model: an initialised model to use in place of the one that the config describes, on its device.
        callbacks, loggers: besides those that the config asks for.
        typed_overwrite: the user typed that the run may be replaced, though it is not over.
        made_by, run_id: the command, and what it knows the run by; noted in the run directory.
    """
    group = joined()
    facts = {"made_by": made_by} | ({} if run_id is None else {"id": run_id})
    if resume is None:
        check_new_run(experiment.config, typed_overwrite)
        config = with_choices(experiment.config, experiment.dims[2], model_is_given=model is not None)
        experiment = replace(experiment, config=config)
    config, split = experiment.config, experiment.split
    run = _run_directory(config, resume, typed_overwrite, facts)
    loggers = [*build_loggers(config, run), *loggers]  # a package that is missing is said before models are loaded
    step = resume.step if resume else None
    alike = data is None and experiment.reads_alike
    data = data or build_dataloader(experiment)
    if resume is None and isinstance(data, ActivationsDataloader) and (alike or group is None or group.is_first):
        check_models_differ(experiment, data.rows)
    if group is not None:
        data = (AlikeSource if alike else SharedSource)(group, as_source(data), available_device(config.device))
    given, width = model, experiment.dims[2]
    model = given or build_model(config, width, experiment.widths_MP).to(available_device(config.device))
    check_threshold_in_time(config, model)
    constraints = build_constraints(config, model)
    model.metadata = metadata = model_metadata(experiment)
    model.position_names = tuple(experiment.output_names())
    if given is not None:
        for constraint in constraints:
            constraint.start(model)
    elif step is None:
        initialise(experiment, model, constraints, data)
    else:
        check_same_language_models(run.checkpoint(step), metadata["language_models"])
    if group is not None:
        shard_(model, group)
        progress = progress and group.is_first
    trainer = Trainer(
        model,
        data,
        split,
        build_objective(config),
        config.train,
        run,
        loggers,
        position_names=experiment.output_names(),
        constraints=constraints,
        evaluate=experiment.evaluate,
        evaluate_every=config.evaluation.every,
        metadata=metadata,
        progress=progress,
        callbacks=[*experiment.callbacks(), *callbacks],
    )
    with nullcontext() if group is None else follow(trainer, group):
        if resume is not None:
            trainer.restore(step)
    return trainer


def _run_directory(
    config: ExperimentConfig, resume: ResumePoint | None, typed_overwrite: bool, facts: dict[str, str]
) -> RunDirectory:
    """Where the run will be, checked; what begins it there waits for the trainer."""
    if resume is not None:
        resume.run.reopen_later(resume.step)
        return resume.run
    run = RunDirectory(config.run_path())
    run.create_later(dump_config(config), partial(check_may_begin, config, typed_overwrite, held=True), **facts)
    return run


def check_new_run(config: ExperimentConfig, typed_overwrite: bool) -> None:
    """What can be said before anything expensive is done."""
    check_stores_outside(config)
    check_may_begin(config, typed_overwrite)


def build_dataloader(experiment: AnyExperiment) -> ActivationsDataloader:
    """Scaled, shuffled training activations."""
    config, rows = experiment.config, experiment.rows()
    relative_norm_MP = None
    if config.data.scale == "own_width":
        relative_norm_MP = (torch.tensor(experiment.widths_MP) / experiment.dims[2]) ** 0.5
    with in_section("data", DataConfig.model_fields):
        return ActivationsDataloader(
            rows,
            batch_size=config.train.batch_size,
            shuffle_buffer_size=0 if rows.shuffled else config.data.shuffle_buffer_size,
            seed=config.seed,
            scale=bool(config.data.scale),
            relative_norm_MP=relative_norm_MP,
            scaled=experiment.split.as_scaled if experiment.split.difference else None,
            n_tokens_for_norm_estimate=config.data.n_tokens_for_norm_estimate,
            drop_last=True,
            prefetch=0 if experiment.reads_alike else config.data.prefetch,  # ranks harvest between steps
            device=experiment.device,
        )


def initialise(
    experiment: AnyExperiment, model: BaseCrosscoder, constraints: list[Constraint], data: ActivationSource
) -> None:
    """Fill the weights: from another model, or by the configured initialisation."""
    config, split = experiment.config, experiment.split

    def samples():
        return (split.activations(acts_BMPD) for acts_BMPD in data)

    if config.finetune_from is not None:
        warm_start(model, config.finetune_from, *split.scaling(data.scaling_MP), samples=samples)
    else:
        init = INITIALIZATIONS.build(config.crosscoder.init)
        model.init_weights(init, config.seed, samples=samples)
    for constraint in constraints:
        constraint.start(model)


def build_loggers(config: ExperimentConfig, run: RunDirectory) -> list[Logger]:
    """The file that is always written, and the extras that were asked for."""
    loggers: list[Logger] = [JsonlLogger(run.metrics_file)]
    if config.train.wandb_project is not None:
        values = config.model_dump(mode="json")
        loggers.append(WandbLogger(config.train.wandb_project, config.name, run.path, values))
    if config.train.tensorboard:
        loggers.append(TensorboardLogger(run.path / "tensorboard"))
    return loggers


def check_threshold_in_time(config: ExperimentConfig, model: BaseCrosscoder) -> None:
    """A BatchTopK is evaluated by its threshold, so that it must be tracked from before the first evaluation."""
    first = min(config.evaluation.every or config.train.n_steps, config.train.n_steps)
    for activation in model.activation_fns:
        activation.check_evaluated_at(first)


def model_metadata(experiment: AnyExperiment) -> dict[str, Any]:
    """What a checkpoint says about where its activations come from."""
    config = experiment.config
    return {
        "language_models": experiment.language_model_facts(),
        "hookpoints": config.hookpoints,
        "widths": experiment.widths_MP,
        "output_positions": experiment.output_names(),
        "architecture": config.crosscoder.type,
        "config": config_values(config),
    }


def check_same_language_models(folder: Path, now: Sequence[dict[str, Any]]) -> None:
    """A run continues, and is judged, on the weights that its saved model in `folder` was trained on."""
    compare_language_models(read_config(folder)["metadata"].get("language_models") or [], now, str(folder))


def compare_language_models(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]], where: str) -> None:
    """Raise `InputError` where models are not those that what is at `where` was trained on."""
    for i, (old, new) in enumerate(zip(before, now, strict=False)):
        differ = [name for name in ("class", "n_layers", "d_model") if old.get(name, new.get(name)) != new.get(name)]
        if differ:
            have = ", ".join(f"{name} {new.get(name)!r} in place of {old[name]!r}" for name in differ)
            raise InputError(f"language_models.{i}.path = {new['path']!r}: has {have}, on which {where!r} was trained")
        if old.get("fingerprint") not in (None, new["fingerprint"]):
            adapted = f" with adapter {new['adapter']!r}" if new.get("adapter") else ""
            raise InputError(
                f"language_models.{i}.path = {new['path']!r}{adapted}: has other weights than when the run began (fingerprint "
                f"{new['fingerprint']}, was {old['fingerprint']})"
            )
