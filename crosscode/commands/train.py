"""`crosscode train`: one run from a config, or on from where one stopped."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from crosscode.commands.parts.command import Command, TrustOptions
from crosscode.commands.parts.libraries import quiet_libraries
from crosscode.commands.parts.options import experiment_values, whole_experiment
from crosscode.config.experiment import ExperimentConfig
from crosscode.errors import InputError

if TYPE_CHECKING:
    from crosscode.trainers.trainer import Trainer

TEXT = """train from a config file or recipe
CONFIG.yaml is a file, a run directory, or a recipe's name (`crosscode recipes`); fields of it are replaced by options.
Ctrl-C or SIGTERM finishes the step, saves, and exits with code 75; a second one exits at once.
`crosscode train --resume RUN` goes on with a run that was stopped, as if it had never stopped; --overwrite replaces it."""


class Options(TrustOptions):
    """What the command takes beside the fields of a config."""

    config: str | None = Field(default=None, title="CONFIG.yaml")
    """what to train"""
    resume: str | None = Field(default=None, title="RUN")
    """go on with this run, by its own config"""


def run(options: Options, fields: Callable[[type[BaseModel]], dict[str, Any]]) -> None:
    quick = fields(ExperimentConfig)
    if options.resume is not None:
        if quick or options.config is not None:
            raise InputError("train: usage: crosscode train --resume RUN (the config is the run's own, as it stands)")
        resume_training(Path(options.resume), options.trust_remote_code)
        return
    if options.config is None:
        raise InputError("train: no config given; usage: crosscode train CONFIG.yaml [--section.field VALUE ...]")
    experiment_values(
        options.config, quick, options.trust_remote_code
    )  # what is wrong in it is said before torch is imported
    from crosscode.build.schema import check_config

    values = experiment_values(options.config, fields(whole_experiment()), options.trust_remote_code)
    config = check_config(values)
    run_training(config, typed_overwrite="overwrite" in quick)


def run_training(config: ExperimentConfig, *, typed_overwrite: bool = False, made_by: str = "train") -> None:
    """Train, evaluate and write the summary of one experiment. What the options mean: `build_trainer`."""
    from crosscode.build.experiment import open_experiment
    from crosscode.build.replacing import check_may_begin
    from crosscode.build.run import build_trainer
    from crosscode.parallel.refusals import for_ranks

    config = for_ranks(config)
    if _was_restarted(config):
        resume_training(config.run_path())
        return
    check_may_begin(config, typed_overwrite)
    quiet_libraries()
    _run_to_the_end(build_trainer(open_experiment(config), typed_overwrite=typed_overwrite, made_by=made_by))


def _was_restarted(config: ExperimentConfig) -> bool:
    """Whether `torchrun` started these processes anew after others of the same run ended (`--max-restarts`)."""
    from crosscode.build.schema import dump_config
    from crosscode.runs.directory import RunDirectory

    run = RunDirectory(config.run_path())
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0 or run.is_finished():
        return False
    return run.config_file.is_file() and run.config_file.read_text(encoding="utf-8") == dump_config(config)


def resume_training(run_dir: Path, trust_remote_code: bool = False) -> None:
    """Continue a run from its newest whole checkpoint."""
    from crosscode.build.experiment import open_experiment
    from crosscode.build.resume import ResumePoint
    from crosscode.build.run import build_trainer
    from crosscode.parallel.refusals import for_ranks

    point = ResumePoint.find(run_dir, trust_remote_code)
    config = for_ranks(point.config)
    quiet_libraries()
    _run_to_the_end(build_trainer(open_experiment(config), resume=point))


def _run_to_the_end(trainer: Trainer) -> None:
    trainer.train()
    summary = trainer.run.read_summary()
    print(f"run         {trainer.run.path}")
    print(f"model       {trainer.run.path / 'final'}")
    for name, value in summary["fvu_by_position"].items():
        print(f"FVU         {_fvu_text(value)}  {name}")
    for name, value in summary["loss_recovered"].items():
        shown = "zeros do not hurt here" if value is None else f"{value:.4f}"
        print(f"recovered   {shown}  {name}")
    for kind, groups in summary["groups"].items():
        for name, of_group in groups.items():
            l0 = f"L0 {of_group['l0']:.1f}, {of_group['n_tokens']} tokens"
            print(f"FVU         {_fvu_text(of_group['fvu'])}  {kind} {name} ({l0})")
    print(f"L0          {summary['l0']:.1f}")
    print(f"dead        {100 * summary['dead_fraction']:.2f} % of latents")
    print(f"speed       {summary['tokens_per_s']:.0f} tokens/s ({summary['backend']} backend, {summary['device']})")


def _fvu_text(fvu: float | None) -> str:
    return "undefined, it does not vary" if fvu is None else f"{fvu:.4f}"


COMMAND = Command(TEXT, run, Options, positional="config", outline=ExperimentConfig, whole=whole_experiment)
