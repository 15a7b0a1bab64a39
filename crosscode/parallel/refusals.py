"""What several processes cannot train: refused by name before anything is loaded, here alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from crosscode_kernels.backend import SPARSE_BELOW

from crosscode.config.data import HarvestConfig
from crosscode.config.experiment import ExperimentConfig
from crosscode.data.harvest.language_models import available_device
from crosscode.errors import InputError
from crosscode.models import ACTIVATIONS
from crosscode.parallel.group import n_ranks


def for_ranks(config: ExperimentConfig, *, to_train: bool = True) -> ExperimentConfig:
    """The config as the processes that `torchrun` started train it, or look at what was trained: nothing is left to what each of
    them would measure. In one process, itself.

    Raises:
        InputError: which field asks for what several processes cannot do.
    """
    ranks = n_ranks()
    if ranks == 1:
        if to_train and (problem := next(problems_of_teams(config, ranks), None)):
            raise InputError(f"{problem} (one process was started)")
        return config
    if problem := refusal(config, ranks, to_train=to_train):
        raise InputError(f"{problem} (torchrun started {ranks} processes)")
    optimizer: Any = config.train.optimizer
    if getattr(optimizer, "row_sparse", None) == "auto":
        optimizer = optimizer.model_copy(update={"row_sparse": False})
    graphs = config.train.cuda_graph is True
    train = config.train.model_copy(update={"optimizer": optimizer, "cuda_graph": graphs})
    on_cpu = available_device(config.device).type == "cpu"
    backend = "torch" if on_cpu and config.backend == "auto" else config.backend
    below = SPARSE_BELOW if on_cpu and config.sparse_below is None else config.sparse_below
    return config.model_copy(update={"backend": backend, "sparse_below": below, "train": train})


def refusal(config: ExperimentConfig, ranks: int, *, to_train: bool = True) -> str | None:
    """What of the config so many processes cannot train."""
    return next(_problems(config, ranks, to_train), None)


def _problems(config: ExperimentConfig, ranks: int, to_train: bool) -> Iterator[str]:
    train, coder = config.train, config.crosscoder
    n_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if available_device(config.device).type == "cuda" and n_here > (n_gpus := torch.cuda.device_count()):
        yield f"device = {config.device!r}: {n_here} processes on this machine, which has {n_gpus} GPU(s); one each is wanted"
    if train.compile and to_train:
        yield "train.compile = True: is for one process"
    yield from _devices(config)
    yield from problems_of_teams(config, ranks)
    if to_train and config.data.cache is not None and shares_models(config):
        yield (
            f"data.cache.path = {config.data.cache.path!r}: one process alone writes it, which holds no whole language models; "
            "harvest first (crosscode harvest --models 0 --store ...), and name the stores as data.join"
        )
    activation: Any = coder.activation
    kind = ACTIVATIONS[activation.type]
    for name, value in (("activation.k", activation.k), ("n_latents", coder.n_latents)) if kind.in_groups else ():
        if value is not None and value % ranks:
            yield f"crosscoder.{name} = {value}: {kind.title} needs a number that the processes divide"


def check_harvest(config: HarvestConfig) -> None:
    """Raise InputError for what several processes cannot harvest."""
    ranks = n_ranks()
    problems = [*(_devices(config) if ranks > 1 else ()), *problems_of_teams(config, ranks)]
    if config.parallel.apart and len(config.language_models) > 1:
        problems.append(
            "parallel.apart = True: a store is of models that are together; harvest each alone (--models 0)"
        )
    if problems:
        raise InputError(f"{problems[0]} (torchrun started {ranks} processes)")


def shares_models(config: HarvestConfig) -> bool:
    """Whether no process holds all language models whole."""
    return config.parallel.model > 1 or config.parallel.apart


def problems_of_teams(config: HarvestConfig, ranks: int) -> Iterator[str]:
    """Of language models over ranks."""
    n_models, parallel = len(config.language_models), config.parallel
    size = f"parallel.model = {parallel.model}"
    if ranks % parallel.model:
        yield f"{size}: must divide the number of processes, {ranks}, that torchrun starts"
    if parallel.apart and n_models and (ranks // parallel.model) % n_models:
        of = "" if parallel.model == 1 else f", {parallel.model} of them for each"
        yield f"parallel.apart = True: {n_models} language models need processes that they divide{of}; there are {ranks}"
    for i, lm in enumerate(config.language_models if shares_models(config) else ()):
        field, value = f"language_models.{i}", size if parallel.model > 1 else "parallel.apart = True"
        for name in ("adapter", "gguf_file", "quantization", "device_map"):
            if (given := getattr(lm, name)) is not None:
                yield f"{field}.{name} = {given!r}: cannot be had with {value}"
        if lm.path.endswith(".gguf"):
            yield f"{field}.path = {lm.path!r}: a GGUF file cannot be had with {value}"
        kind = available_device("auto").type  # of device over which `transformers` splits a model
        if parallel.model > 1 and available_device(lm.device or config.device).type != kind:
            yield f"{field}: {size} splits over {kind}; let device be that"


def _devices(config: HarvestConfig) -> Iterator[str]:
    named = [("device", config.device)]
    for i, lm in enumerate(config.language_models):
        named.append((f"language_models.{i}.device", lm.device or ""))
        if lm.device_map is not None:
            yield f"language_models.{i}.device_map = {lm.device_map!r}: each process would take the GPUs of all; leave it out"
    for field, device in named:
        if ":" in device:
            yield f"{field} = {device!r}: each process has a GPU of its own; write {device.partition(':')[0]!r}"
