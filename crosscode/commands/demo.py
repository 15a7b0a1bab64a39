"""`crosscode demo`: train, evaluate and report on language models that come with crosscode."""

from __future__ import annotations

import sys
from typing import Any

from pydantic import Field, PositiveInt

from crosscode.commands.parts.command import Command
from crosscode.commands.parts.options import experiment_values
from crosscode.commands.report import report_run
from crosscode.commands.train import resume_training, run_training
from crosscode.config.experiment import ExperimentConfig
from crosscode.config.registry import ConfigModel


class Options(ConfigModel):
    run_dir: str = Field(default="runs/demo", title="DIR")
    """where to write"""
    n_tokens: PositiveInt | None = None
    """activations to train on; null: as in the recipe"""
    overwrite: bool = False
    """replace what is there, even another run or one that is not over"""
    backend: str = ExperimentConfig.model_fields["backend"].default
    """auto, triton, torch or reference"""


def run(options: Options) -> None:
    changes: dict[str, Any] = {"run_dir": options.run_dir, "backend": options.backend}
    if options.n_tokens is not None:
        changes["train"] = {"n_tokens": options.n_tokens}
    values = experiment_values("demo", changes)
    from crosscode.build.replacing import is_the_same_experiment
    from crosscode.build.schema import check_config
    from crosscode.runs.directory import RunDirectory

    config = check_config(values)
    run = RunDirectory(config.run_path())
    own = is_the_same_experiment(run, config, "demo")
    told = "a base trained on Python sources, and a fine-tune of it that learnt one made-up sentence"
    print(f"language models: {told}", file=sys.stderr)
    if own and not (run.is_finished() or options.overwrite):
        print(f"a demo in {options.run_dir} was interrupted: it goes on", file=sys.stderr)
        resume_training(run.path)
    else:
        config = config.model_copy(update={"overwrite": own or options.overwrite})
        run_training(config, typed_overwrite=options.overwrite, made_by="demo")
    report = report_run(
        config.run_path(), steer_prompt="import os\n\ndef main", say=lambda line: print(f"found       {line}")
    )
    print(f"report      {report}")


COMMAND = Command("train, evaluate and report a crosscoder between two embedded language models", run, Options)
