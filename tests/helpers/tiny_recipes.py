"""Tiny runs of every recipe on stand-in activations, in place of harvested ones.

Axes: B tokens · M models · P hookpoints · D width · L latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from crosscode.build.experiment import Experiment
from crosscode.build.resume import ResumePoint
from crosscode.build.run import build_trainer
from crosscode.build.schema import check_config, dump_config, read_yaml
from crosscode.files import write_text
from crosscode.models.architecture import split_for

N_STEPS, BATCH, WIDTH, N_LATENTS, K = 3, 8, 10, 24, 3
CHANGES: dict[str, Any] = {}
"""Fields of sections, and fields beside these, that a recipe is to have besides."""


class StandIn:
    """An endless stream in the place of harvested activations: sparse sums of fixed directions, and noise."""

    def __init__(self, dims: tuple[int, int, int], device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        directions_FMPD = torch.randn(20, *dims, generator=generator)
        active_SBF = (torch.rand(N_STEPS, BATCH, 20, generator=generator) < 0.2).float()
        acts_SBMPD = torch.einsum("sbf,fmpd->sbmpd", active_SBF, directions_FMPD)
        acts_SBMPD += 0.3 * torch.randn(acts_SBMPD.shape, generator=generator)
        self.acts_SBMPD = acts_SBMPD.to(device, dtype)
        self.scaling_MP = torch.ones(dims[:2], device=device)
        self.number = 0

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            self.number += 1
            yield self.acts_SBMPD[(self.number - 1) % N_STEPS]

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


def tiny(
    name: str, folder: Any, backend: str, device: str, train: dict[str, Any] | None = None, n_latents: int = N_LATENTS
) -> dict[str, Any]:
    """The recipe with fewer latents and tokens, and some fields of `train` changed (of its optimizer those that are named).
    Latents count as dead after one batch, so that AuxK has work to do."""
    values = read_yaml(name)
    values |= {"run_dir": str(folder), "backend": backend, "device": device}
    crosscoder, activation = values["crosscoder"], values["crosscoder"]["activation"]
    crosscoder.pop("expansion_factor", None)
    is_compound = crosscoder["type"] == "compound_cross_layer_transcoder"
    crosscoder["n_latents"] = n_latents * (len(values["hookpoints"]) // 2 if is_compound else 1)
    if "k" in activation:
        activation["k"] = 4 if activation["type"] == "groupmax" else min(K, n_latents - 1)
    if "k_start" in activation:
        activation["k_start"] = min(2 * K, n_latents)
    if "auxk" in values["objective"]:
        values["objective"]["auxk"] |= {"k_aux": min(5, n_latents), "dead_after_tokens": BATCH}
    if "l0" in values["objective"]:
        values["objective"]["l0"]["target"] = K + 0.4
    for init in (crosscoder["init"], crosscoder["init"].get("first", {})):
        init |= {"jan_update": {"n_calibration_tokens": 24}, "zero_dec_skip": {"n_mean_tokens": 24}}.get(
            init.get("type", ""), {}
        )
    values["train"] |= {"n_tokens": N_STEPS * BATCH, "batch_size": BATCH, "log_every": 1, "checkpoint_every": None}
    values["evaluation"] = {"n_tokens": BATCH}
    train = dict(train or {})
    train["optimizer"] = values["train"]["optimizer"] | train.get("optimizer", {})
    values["train"] |= train
    for section, fields in CHANGES.items():
        values[section] = values[section] | fields if isinstance(fields, dict) else fields
    return values


def make_trainer(
    name: str, folder: Any, backend: str, device: str, dtype: torch.dtype = torch.float32, resume: bool = False,
    train: dict[str, Any] | None = None, n_latents: int = N_LATENTS,
):  # fmt: skip
    """The trainer of a tiny recipe, its language models replaced by the stream."""
    config = check_config(tiny(name, folder, backend, device, train, n_latents))
    dims = (len(config.language_models), len(config.hookpoints), WIDTH)
    models: Any = [SimpleNamespace(fingerprint=lambda: "none", facts=dict) for _ in config.language_models]
    harvester: Any = SimpleNamespace(dims=dims, models=models, widths_MP=[[WIDTH] * dims[1]] * dims[0])
    documents: Any = None
    experiment = Experiment(
        config=config,
        split=split_for(config.crosscoder.type),
        documents=documents,
        heldout_documents=documents,
        harvester=harvester,
    )
    point = None
    if resume:
        write_text(config.run_path() / "config.yaml", dump_config(config))  # whole: other ranks read it
        point = ResumePoint.find(config.run_path())
    trainer = build_trainer(experiment, data=StandIn(dims, device, torch.float32), resume=point, progress=False)
    # An initialisation that looks at data has taken batches from the stream.
    data = StandIn(dims, device, dtype)
    data.number = trainer.step
    trainer.data, trainer.config = data, trainer.config.model_copy(update={"log_every": None})
    trainer.model.to(dtype)
    return trainer
