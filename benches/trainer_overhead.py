"""What the trainer adds to a step beyond the model's own operations: a model of size ~0 on the CPU.

    python benches/trainer_overhead.py [--steps 2000]

Two loops over the same tiny batch: the bare one (forward, objective, backward, clip, fused Adam), and the trainer's
`train_step` with `log_every` steps between rows of metrics. One thread; CPU time, which a busy machine hardly changes, and
wall time. Rounds alternate; medians of the rounds are shown and written to benches/results/trainer_overhead.json.

Axes: B tokens · M models · P hookpoints · D width · L latents.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from data_common import report

from crosscode.config.experiment import TrainConfig
from crosscode.config.registry import Component
from crosscode.models import AnthropicTransposeInit, BatchTopkActivation, ModelHookpointAcausalCrosscoder
from crosscode.models.architecture import split_for
from crosscode.objectives import TERMS, Objective, as_schedule
from crosscode.objectives.base import LossContext
from crosscode.runs.directory import RunDirectory
from crosscode.runs.loggers import JsonlLogger
from crosscode.trainers.optimizers.adam import Adam
from crosscode.trainers.trainer import Trainer

ROUNDS = 5


class OneBatch:
    """The same scaled batch for ever."""

    scaling_MP = torch.ones(2, 1)

    def __init__(self):
        self.acts_BMPD = torch.randn(4, 2, 1, 4)

    def __iter__(self):
        while True:
            yield self.acts_BMPD

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    def close(self):
        pass


def make_model():
    model = ModelHookpointAcausalCrosscoder(2, 1, 4, 8, BatchTopkActivation(2, 8), backend="torch")
    return model.init_weights(AnthropicTransposeInit(), 0).train()


def make_objective():
    return Objective({"recon": (TERMS["recon"](), as_schedule(1.0))})


def make_trainer(folder: Path, log_every: int) -> Trainer:
    run = RunDirectory(folder)
    run.create("name: bench\n")
    config = TrainConfig(n_tokens=4, batch_size=4, log_every=log_every, optimizer=Component(type="adam", lr=1e-3))
    split = split_for("model_hookpoint_acausal")
    loggers = [JsonlLogger(run.metrics_file)]
    return Trainer(
        make_model(), OneBatch(), split, make_objective(), config, run, loggers,
        position_names=["a", "b"], n_steps=10**9, progress=False,
    )  # fmt: skip


class Clock:
    """CPU time of the process and wall time, seconds a step."""

    def __init__(self):
        self._started = time.process_time(), time.perf_counter()

    def per_step(self, n_steps: int) -> dict[str, float]:
        cpu, wall = self._started
        return {"cpu": (time.process_time() - cpu) / n_steps, "wall": (time.perf_counter() - wall) / n_steps}


def bare_loop(n_steps: int) -> dict[str, float]:
    model, objective, data = make_model(), make_objective(), OneBatch()
    optimizer = Adam(lr=1e-3).build(model)
    never_fired_L = torch.zeros(8, dtype=torch.int64)
    clock = Clock()
    for step, acts_BMPD in zip(range(n_steps), data, strict=False):
        forward = model.forward_train(acts_BMPD)
        context = LossContext(model, acts_BMPD, acts_BMPD, forward, never_fired_L)
        objective(context, step, n_steps).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return clock.per_step(n_steps)


def trainer_loop(n_steps: int, log_every: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder) / "run", log_every)
        trainer.start()
        batches = iter(trainer.data)
        clock = Clock()
        for _ in range(n_steps):
            with trainer.phases("harvest"):
                acts_BMPD = next(batches)
            trainer.train_step(acts_BMPD)
        return clock.per_step(n_steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="steps of a round (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bare_loop(50)
    trainer_loop(50, 1)
    rounds = [
        (bare_loop(options.steps), trainer_loop(options.steps, 50), trainer_loop(options.steps, 1))
        for _ in range(ROUNDS)
    ]
    rows = []
    for i, name in enumerate(("bare loop", "trainer, log_every = 50", "trainer, log_every = 1")):
        row: dict[str, str | float] = {"loop": name}
        for clock in ("cpu", "wall"):
            row[f"{clock}_ms"] = round(1e3 * statistics.median(found[i][clock] for found in rounds), 4)
            over = 1e3 * statistics.median(found[i][clock] - found[0][clock] for found in rounds)
            row[f"{clock}_overhead_ms"] = round(over, 4)
        rows.append(row)
    report("trainer_overhead", rows)


if __name__ == "__main__":
    main()
