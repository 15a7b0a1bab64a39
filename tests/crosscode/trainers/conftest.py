"""A trainer over planted activations, without language models: small, seeded, any scheme.

Axes: B tokens · M models · P hookpoints · D width.
"""

import json
import resource

import pytest
import torch

from crosscode.models import ACTIVATIONS, INITIALIZATIONS, MODELS
from crosscode.objectives import TERMS, Objective, as_schedule
from crosscode.trainers.loggers import JsonlLogger
from crosscode.trainers.optimizers import OPTIMIZERS
from crosscode.trainers.run_directory import RunDirectory
from crosscode.trainers.split import split_for
from crosscode.trainers.trainer import Trainer, TrainerSettings

N_MODELS, N_HOOKPOINTS, WIDTH, N_LATENTS = 2, 1, 6, 24


class PlantedActivations:
    """Batches that depend on the seed and on the number of the batch only. `poison` maps a batch to a value put in."""

    def __init__(self, batch_size=32, dims=(N_MODELS, N_HOOKPOINTS, WIDTH), n_batches=None, poison=None, device="cpu"):
        self.batch_size, self.dims, self.n_batches, self.poison = batch_size, dims, n_batches, poison or {}
        self.device = device
        self.number = 0
        self.scaling_MP = torch.linspace(0.5, 2.0, dims[0] * dims[1]).reshape(dims[:2])

    def __iter__(self):
        while self.n_batches is None or self.number < self.n_batches:
            generator = torch.Generator().manual_seed(self.number)
            features = torch.randn(40, *self.dims, generator=torch.Generator().manual_seed(99))
            active = torch.rand(self.batch_size, 40, generator=generator) < 0.1
            acts_BMPD = torch.einsum("bf,fmpd->bmpd", active.float(), features) + 0.1
            if self.number in self.poison:
                acts_BMPD[0] = self.poison[self.number]
            self.number += 1
            yield acts_BMPD.to(self.device)

    def state_dict(self):
        return {"number": self.number, "scaling_MP": self.scaling_MP}

    def close(self):
        pass

    def load_state_dict(self, state):
        self.number = state["number"]


def build_objective(terms):
    made = {}
    for name, options in terms.items():
        config = TERMS[name].Config(**options)
        params = {key: getattr(config, key) for key in type(config).model_fields if key not in ("type", "weight")}
        made[name] = (TERMS[name](**params), as_schedule(config.weight))
    return Objective(made)


@pytest.fixture
def make_trainer(tmp_path):
    """`make_trainer(name, activation=..., objective=..., data=..., kind=..., **settings)`."""

    def make(
        name="run",
        *,
        activation=None,
        objective=None,
        data=None,
        kind="model_hookpoint_acausal",
        optimizer=None,
        constraints=(),
        evaluate=None,
        backend="torch",
        seed=0,
        n_latents=N_LATENTS,
        model_options=None,
        **settings,
    ):
        torch.set_num_threads(1)
        data = data or PlantedActivations()
        split = split_for(kind)
        activation = dict(activation or {"type": "topk", "k": 4})
        activation_fn = ACTIVATIONS[activation.pop("type")](**activation, n_latents=n_latents)
        dims = split.model_dims(*data.dims)
        model = MODELS[split.model_kind](
            **dims, n_latents=n_latents, activation_fn=activation_fn, backend=backend, **(model_options or {})
        )
        init = "anthropic_transpose" if split.model_kind == "model_hookpoint_acausal" else "compound_uniform"
        model.init_weights(INITIALIZATIONS[init](), seed).to(data.device)
        optimizer = dict(optimizer or {"type": "adam", "lr": 0.01})
        recipe = OPTIMIZERS[optimizer.pop("type")](**optimizer)
        run = RunDirectory(tmp_path / name)
        if not run.config_file.is_file():
            run.create("name: test\n")
        names = [f"x{i}" for i in range(len(model.segments))]
        defaults = {"n_steps": 10, "log_every": 1}
        return Trainer(
            model,
            data,
            split,
            build_objective(objective or {"recon": {}}),
            recipe,
            TrainerSettings(**(defaults | settings)),
            run,
            [JsonlLogger(run.metrics_file)],
            position_names=names,
            constraints=constraints,
            evaluate=evaluate,
            progress=False,
        )

    return make


@pytest.fixture
def planted():
    return PlantedActivations


@pytest.fixture
def rows_of():
    """Rows of a trainer's metrics.jsonl."""
    return lambda trainer: [json.loads(line) for line in trainer.run.metrics_file.read_text().splitlines()]


@pytest.fixture
def small_files():
    """A limit on the size of files stands in for a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(n_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
