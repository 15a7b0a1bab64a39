"""`crosscode evaluate`: held-out figures of a trained run."""

from __future__ import annotations

import json
import sys

from pydantic import Field, PositiveInt

from crosscode.commands.parts.command import Command
from crosscode.commands.parts.libraries import quiet_libraries
from crosscode.config.registry import ConfigModel


class Options(ConfigModel):
    run_dir: str = Field(title="RUN")
    """run directory"""
    n_tokens: PositiveInt | None = None
    """held-out activations; null: as in the run's config"""
    trust_remote_code: bool = False
    """let the run's language models run code of their own, where its config says so"""


def run(options: Options) -> None:
    from crosscode.build.experiment import open_experiment
    from crosscode.build.schema import load_own_config
    from crosscode.runs.directory import open_run
    from crosscode.trainers.warm_start import find_model, load_folded

    quiet_libraries()
    run = open_run(options.run_dir)
    config = load_own_config(run.config_file, options.trust_remote_code)
    folder = find_model(str(run.path), "run")
    if folder != run.final:
        print(f"crosscode: training is not over: these are figures of {folder}", file=sys.stderr)
    experiment = open_experiment(config, to_train=False)
    model = load_folded(folder, config.backend, experiment.harvester.device)
    result = experiment.evaluate(model, n_tokens=options.n_tokens)
    run.write_evaluation(result.to_json())
    shown = {name: value for name, value in result.to_json().items() if name != "density_L"}
    print(json.dumps(shown, indent=2))


COMMAND = Command("held-out figures of a trained run", run, Options, positional="run_dir")
