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
from crosscode.parallel.group import n_ranks


def for_ranks(config: ExperimentConfig, *, to_train: bool = True) -> ExperimentConfig:
    """The config as the processes that `torchrun` started train it, or look at what was trained: nothing is left to what each of
    them would measure. In one process, itself.

    Raises:
        InputError: which field asks for what several processes cannot do.
    """
    ranks = n_ranks()
    if ranks == 1:
        return config
    if problem := refusal(config, ranks, to_train=to_train):
        raise InputError(f"{problem} (torchrun started {ranks} processes)")
    optimizer: Any = config.train.optimizer
    if getattr(optimizer, "row_sparse", None) == "auto":
        optimizer = optimizer.model_copy(update={"row_sparse": False})
    train = config.train.model_copy(update={"optimizer": optimizer})
    measured = config.backend == "auto" and available_device(config.device).type == "cpu"
    backend = "torch" if measured else config.backend
    below = SPARSE_BELOW if config.sparse_below is None else config.sparse_below
    return config.model_copy(update={"backend": backend, "sparse_below": below, "train": train})


def refusal(config: ExperimentConfig, ranks: int, *, to_train: bool = True) -> str | None:
    """What of the config so many processes cannot train."""
    return next(_problems(config, ranks, to_train), None)


def _problems(config: ExperimentConfig, ranks: int, to_train: bool) -> Iterator[str]:
    train, coder = config.train, config.crosscoder
    n_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if available_device(config.device).type == "cuda" and n_here > (n_gpus := torch.cuda.device_count()):
        yield f"device = {config.device!r}: {n_here} processes on this machine, which has {n_gpus} GPU(s); one each is wanted"
    get = lambda part, name: getattr(part, name, None)  # noqa: E731
    if train.compile and to_train:
        yield "train.compile = True: is for one process"
    yield from _devices(config)
    n_latents: Any = get(coder, "n_latents")
    if n_latents and n_latents < ranks:
        yield f"crosscoder.n_latents = {n_latents}: must be at least one for each process"
    activation: Any = get(coder, "activation")
    if get(activation, "type") == "groupmax":
        for name, value in (("activation.k", activation.k), ("n_latents", n_latents)):
            if value is not None and value % ranks:
                yield f"crosscoder.{name} = {value}: GroupMax needs a number that the processes divide"


def check_harvest(config: HarvestConfig) -> None:
    """Raise InputError for what several processes cannot harvest."""
    if (ranks := n_ranks()) > 1 and (problem := next(_devices(config), None)):
        raise InputError(f"{problem} (torchrun started {ranks} processes)")


def _devices(config: HarvestConfig) -> Iterator[str]:
    named = [("device", config.device)]
    for i, lm in enumerate(config.language_models):
        named.append((f"language_models.{i}.device", lm.device or ""))
        if lm.device_map is not None:
            yield f"language_models.{i}.device_map = {lm.device_map!r}: each process would take the GPUs of all; leave it out"
    for field, device in named:
        if ":" in device:
            yield f"{field} = {device!r}: each process has a GPU of its own; write {device.partition(':')[0]!r}"
