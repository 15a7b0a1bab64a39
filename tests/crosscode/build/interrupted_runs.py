"""Run as a script: trains each scenario in a process of its own, forked from one that has imported everything.

Takes a JSON file with a list of scenarios and writes the exit status of each into another. A scenario names a config
file, or a run to resume; the signal that the process sends to itself, if any; and where.
"""

import itertools
import json
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch

from crosscode.build.experiment import open_experiment
from crosscode.build.schema import load_config
from crosscode.commands import cli
from crosscode.commands.parts.libraries import quiet_libraries
from crosscode.data import rows as rows_module
from crosscode.data.rows import harvest_usable
from crosscode.runs.loggers import JsonlLogger
from crosscode.trainers import saver as saver_module
from crosscode.trainers.faults import FiniteGuard
from crosscode.trainers.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))
from forked import in_child, in_child_with_imports


def strike(scenario):
    """Patches under which the process sends itself the signal at the place that the scenario names."""
    number = getattr(signal, scenario["signal"])
    step, place = scenario["step"], scenario["place"]

    def before(original, due):
        def patched(*args, **kwargs):
            if due(*args):
                os.kill(os.getpid(), number)
            return original(*args, **kwargs)

        return patched

    if place == "step":  # at the start of the update after `step` others
        return mock.patch.object(
            Trainer, "train_step", before(Trainer.train_step, lambda self, acts: self.step == step)
        )
    if place == "update":  # gradients are there, the weights are not changed yet
        due = lambda self, at, *_: at == step  # noqa: E731
        return mock.patch.object(FiniteGuard, "before_optimizer", before(FiniteGuard.before_optimizer, due))
    if place == "evaluation":  # of a training step, or of the trained model at the end
        due = lambda self, scaling_MP: self.step == step  # noqa: E731
        return mock.patch.object(Trainer, "_evaluate", before(Trainer._evaluate, due))
    if place == "row":  # half a line of metrics is on disk
        original = JsonlLogger.log

        def log(self, metrics):
            if metrics["step"] == step:
                with self._rows.path.open("a") as file:
                    file.write('{"step": ')
                os.kill(os.getpid(), number)
            original(self, metrics)

        return mock.patch.object(JsonlLogger, "log", log)
    if place in (
        "harvest",
        "harvested",
    ):  # within the wait for a batch, before or after the activations of the n-th are there
        calls = itertools.count(1)

        def harvest(*args):
            due = next(calls) == step
            if due and place == "harvest":
                os.kill(os.getpid(), number)
            rows = harvest_usable(*args)
            if due and place == "harvested":
                os.kill(os.getpid(), number)
            return rows

        return mock.patch.object(rows_module, "harvest_usable", harvest)
    assert place == "checkpoint"  # one of its files is written, the others are not
    due = lambda folder, state: state["step"] == step  # noqa: E731
    return mock.patch.object(saver_module, "write_state", before(saver_module.write_state, due))


def train(scenario):
    return cli.main(["train", *(["--resume", scenario["resume"]] if "resume" in scenario else [scenario["config"]])])


def main(scenarios_file, results_file):
    torch.set_num_threads(1)
    quiet_libraries()
    scenarios = json.loads(Path(scenarios_file).read_text())
    # What is slow the first time is done before the forks. No backward pass: autograd does not survive a fork.
    for _ in open_experiment(load_config(scenarios[0]["config"])).heldout_activations():
        pass
    statuses = []
    for scenario in scenarios:

        def work(scenario=scenario):
            with strike(scenario) if scenario.get("signal") else nullcontext():
                return train(scenario)

        first = not statuses  # it is not struck
        statuses.append(in_child_with_imports(work, Path(f"{results_file}-imports")) if first else in_child(work))
    Path(results_file).write_text(json.dumps(statuses))


if __name__ == "__main__":
    main(*sys.argv[1:])
