"""`crosscode harvest`: write a store of activations ahead of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crosscode.build.data import Activations, build_token_loader, open_activations
from crosscode.commands.overrides import Command
from crosscode.config.checked import checked
from crosscode.config.data import HarvestConfig
from crosscode.config.experiment import ExperimentConfig
from crosscode.data.store.harvest import harvest_to_store
from crosscode.data.store.reader import ActivationCache
from crosscode.errors import InputError, Interrupted, at_field
from crosscode.trainers.interruption import StopSignals
from crosscode.trainers.progress import Progress

HELP_HEAD = """Write the activations of a config's text to the store `data.cache`, ahead of training.
CONFIG.yaml is that of a run (a file, a run directory, a recipe's name), of which only the fields below are read; without
it, give these as options. What was stopped or killed goes on after its last whole shard with the same command.
--store DIR is short for --data.cache.path DIR; --n-tokens N stops at N activations (default: one pass over the text).
A run reads the store with --data.stores '["DIR"]', or reads and completes it with --data.cache.path DIR."""
HARVEST = Command("harvest", HELP_HEAD, lambda: HarvestConfig, needs_file=False)


def harvest_config(values: Mapping[str, Any]) -> HarvestConfig:
    """What a harvest needs of a run's values; stores that the run reads are not looked at.

    Raises:
        InputError: naming each bad field, its value and what is allowed; or no store to write is named.
    """
    own = HarvestConfig.model_fields
    kept = {name: value for name, value in values.items() if name in own or name not in ExperimentConfig.model_fields}
    if isinstance(kept.get("data"), Mapping):
        kept["data"] = {name: value for name, value in kept["data"].items() if name != "stores"}
    config = checked(HarvestConfig, kept)
    if config.data.cache is None:
        raise InputError("data.cache: no store to write is given; name its folder with --store DIR")
    return config


def run_harvest(config: HarvestConfig, n_tokens: int | None = None, *, progress: bool = True) -> ActivationCache:
    """Write the store, or go on with it; a complete one is left as it is.

    Raises:
        Interrupted: a signal came; what was harvested is stored.
        InputError: bad config; a store that holds something else; StoreError where it cannot be written.
    """
    cache = config.data.cache
    assert cache is not None
    activations = Activations(config=config, **open_activations(config))
    with (
        StopSignals() as stop,
        Progress(n_tokens, what="harvest", unit="activation", enabled=progress) as shown,
        at_field("data.cache"),
    ):

        def on_progress(n_rows: int, n_bytes: int) -> None:
            shown.show(n_rows, f"{n_bytes / 2**30:.2f} GiB")
            if stop.received:
                raise Interrupted(f"stopped by {stop.received} at {n_rows} activations; the same command goes on")

        store = harvest_to_store(
            build_token_loader(activations, heldout=False),
            activations.harvester,
            cache.path,
            **cache.arguments(),
            max_rows=n_tokens,
            on_progress=on_progress,
        )
    if store.n_rows == 0:
        raise InputError(f"data.cache.max_gb = {cache.max_gb}: too small for the activations of one harvest")
    return store
