"""`crosscode harvest`: write a store of activations ahead of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt

from crosscode.commands.parts.command import Command, TrustOptions
from crosscode.commands.parts.libraries import quiet_libraries
from crosscode.commands.parts.options import merged
from crosscode.commands.parts.text_config import text_config
from crosscode.config.data import HarvestConfig
from crosscode.config.reading import read_trusted
from crosscode.errors import InputError, Interrupted, at_field

if TYPE_CHECKING:
    from crosscode.data.store.reader import ActivationCache

TEXT = """write activations to a store ahead of training
The activations of a config's text go to the store `data.cache`. CONFIG.yaml is that of a run (a file, a run directory, a
recipe's name), of which only the fields below are read; without it, give these as options. The same command goes on
with what was stopped or killed, after its last whole shard. Under torchrun each rank harvests shards of its own. A run reads
the store with --data.stores DIR, or reads and completes it with --data.cache.path DIR."""


class Options(TrustOptions):
    config: str | None = Field(default=None, title="CONFIG.yaml")
    """what to take the fields below from"""
    store: str | None = Field(default=None, title="DIR")
    """the folder of the store, or a URL such as s3://bucket/store; short for --data.cache.path"""
    n_tokens: PositiveInt | None = None
    """where to stop; null: after one pass over the text"""
    models: list[NonNegativeInt] | None = Field(default=None, title="NUMBER")
    """harvest these of the config's language models alone, counted from 0 (--models 0 --models 1); a run reads stores that
    were harvested apart with --data.join DIR,DIR"""


def run(options: Options, fields: Callable[[type[BaseModel]], dict[str, Any]]) -> None:
    store = {} if options.store is None else {"data": {"cache": {"path": options.store}}}
    typed = merged(fields(HarvestConfig), store)
    config = harvest_config(
        merged(read_trusted(options.config, options.trust_remote_code) if options.config else {}, typed)
    )
    own = config_of(config, options.models)
    quiet_libraries()
    from crosscode.parallel.group import is_first

    cache = run_harvest(config, options.n_tokens, options.models, progress=is_first())
    if not is_first():
        return
    M, P, D = cache.dims
    print(f"store       {cache.path}")
    print(f"activations {cache.n_rows} of {M} x {P} x {D}, {cache.layout.dtype}")
    print(f"size        {cache.n_bytes / 2**20:.1f} MiB in {len(cache.shards)} shards")
    for names, norms in zip(own.position_names(), cache.mean_norm_MP().tolist(), strict=True):
        for name, norm in zip(names, norms, strict=True):
            print(f"mean norm   {norm:.4g}  {name}")


def harvest_config(values: Mapping[str, Any]) -> HarvestConfig:
    """What a harvest needs of a run's values.

    Raises:
        InputError: naming each bad field, its value and what is allowed; or no store to write is named.
    """
    config = text_config(values)
    if config.data.cache is None:
        raise InputError("data.cache: no store to write is given; name its folder with --store DIR")
    return config


def config_of(config: HarvestConfig, models: Sequence[int] | None) -> HarvestConfig:
    """Of these of its language models alone, by number; None: of all. Raises InputError for a number that is none."""
    if models is None:
        return config
    named = config.language_models
    for m in models:
        if m >= len(named) or list(models).count(m) > 1:
            wrong = "is named twice" if m < len(named) else f"must be below {len(named)}, the number of language_models"
            raise InputError(f"models = {m}: {wrong}")
    return config.model_copy(update={"language_models": [named[m] for m in models]})


def run_harvest(
    config: HarvestConfig, n_tokens: int | None = None, models: Sequence[int] | None = None, *, progress: bool = True
) -> ActivationCache:
    """Write the store, or go on with it; a complete one is left as it is. `models`: numbers of the language models that are
    harvested, default all; their rows are those of a harvest of all.

    Raises:
        Interrupted: a signal came; what was harvested is stored.
        InputError: bad config; a store that holds something else; StoreError where it cannot be written.
    """
    from crosscode.build.data import Activations, build_token_loader, open_activations
    from crosscode.build.foresight import check_language_models
    from crosscode.data.store.harvest import HarvestThroughStore, harvest_to_store
    from crosscode.data.store.reader import ActivationCache
    from crosscode.parallel.harvest import alone
    from crosscode.parallel.refusals import check_harvest
    from crosscode.parallel.store import harvest_over_ranks
    from crosscode.parallel.teams import Teams
    from crosscode.stopping import Stopped, StopSignals, check_not_stopped
    from crosscode.trainers.progress import Progress

    cache, together = config.data.cache, config.language_models
    assert cache is not None
    config = config_of(config, models)
    check_harvest(config)
    check_language_models(config)
    teams = Teams.of(config)
    activations = Activations(config=config, **open_activations(config, together=together))
    with (
        StopSignals() as stop,
        Progress(n_tokens, what="harvest", unit="activation", enabled=progress) as shown,
        at_field("data.cache"),
    ):

        def on_progress(n_rows: int, n_bytes: int) -> None:
            shown.show(n_rows, f"{n_bytes / 2**30:.2f} GiB")
            check_not_stopped()

        try:
            harvested = build_token_loader(activations, heldout=False), alone(activations.harvester), cache.path
            if teams is None:
                store = harvest_to_store(*harvested, **cache.arguments(), max_rows=n_tokens, on_progress=on_progress)
            else:
                through = HarvestThroughStore(*harvested, **cache.arguments())
                store = harvest_over_ranks(teams, through, max_rows=n_tokens, on_progress=on_progress)
        except Stopped:
            n_rows = ActivationCache(cache.path, unfinished=True).n_rows
            if n_rows == 0:
                raise
            stopped = f"stopped by {stop.received} at {n_rows} activations; the same command goes on"
            raise Interrupted(stopped) from None
    if store.n_rows == 0:
        raise InputError(f"data.cache.max_gb = {cache.max_gb}: too small for the activations of one harvest")
    return store


COMMAND = Command(TEXT, run, Options, positional="config", outline=HarvestConfig)
