"""The stores that a config names: checked before anything is loaded, opened once it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crosscode.config.data import HarvestConfig, StoreConfig
from crosscode.config.experiment import ExperimentConfig
from crosscode.data.harvest.harvester import ActivationHarvester
from crosscode.data.harvest.language_models import LanguageModel
from crosscode.data.shuffle import DEFAULT_CAPACITY
from crosscode.data.store.manifest import Manifest, check_same_content, dtype_name, make_manifest
from crosscode.data.store.reader import ActivationCache
from crosscode.data.store.rows import StoredRows
from crosscode.data.store.writer import check_can_write
from crosscode.data.text.documents import DocumentSource
from crosscode.data.text.mixture import parts_of
from crosscode.data.text.tokens import TokenSequenceLoader
from crosscode.errors import InputError, at_field
from crosscode.files import check_may_be_filled

_NOT_IN_THE_MANIFEST = ("epochs", "n_workers", "mask_special_tokens", "mask_token_ids")


def check_stores(
    config: HarvestConfig,
    options: dict[str, Any],
    documents: DocumentSource | None = None,
    models: Sequence[LanguageModel] | None = None,
) -> None:
    """Refuse a store that is damaged, or that does not hold what the config asks for.

    `options` are the token loader's; with `documents` the text is compared as well. What takes a loaded language model
    (weights, tokenizer) is left to `stored_rows` and the writer. `models`: those in memory, if the config's are not
    what is used.
    """
    tokens = {name: value for name, value in options.items() if name not in _NOT_IN_THE_MANIFEST}
    loaded = [{"name": model.name, "dtype": dtype_name(model)} for model in models or ()]
    wanted: Manifest = {
        "models": loaded or [{"name": lm.path, "dtype": lm.dtype} for lm in config.language_models],
        "hookpoints": config.hookpoints,
        "tokens": tokens,
    }
    cache = config.data.cache
    if cache is not None:
        check_may_be_filled(cache.path, "data.cache.path")
        text = {} if documents is None else {"dataset": documents.fingerprint}
        with at_field("data.cache"):
            check_can_write(
                cache.path,
                {
                    **wanted,
                    "dtype": cache.dtype,
                    "activation_dtype": config.data.activation_dtype,
                    "tokens": {**tokens, **text},
                },
            )
    for i, store in enumerate(config.data.stores):
        with at_field(f"data.stores.{i}"):
            opened = _open(store)
            same_text = wanted if documents is None else _with_text_of(opened, wanted, documents)
            check_same_content(opened.path, opened.manifest, same_text, to_append=False, partly=True)


def check_stores_outside(config: ExperimentConfig) -> None:
    """Refuse a store inside the new run's own directory, where only the run belongs."""
    run = config.run_path().resolve()
    cache = config.data.cache
    paths = {f"data.stores.{i}": store.path for i, store in enumerate(config.data.stores)}
    paths |= {} if cache is None else {"data.cache.path": cache.path}
    for field, path in paths.items():
        if Path(path).resolve().is_relative_to(run):
            raise InputError(
                f"{field} = {path!r}: is inside the run directory {str(config.run_path())!r}; put the store beside it"
            )


def stored_rows(config: HarvestConfig, tokens: TokenSequenceLoader, harvester: ActivationHarvester) -> StoredRows:
    """The stores of a config as rows; each holds what `harvester` would make of `tokens`' text or of a part of it."""
    data = config.data
    wanted = make_manifest(tokens, harvester, dtype="float32")
    opened = []
    for i, store in enumerate(data.stores):
        with at_field(f"data.stores.{i}"):
            opened.append(_open(store))
            same_text = _with_text_of(opened[-1], wanted, tokens.source)
            check_same_content(opened[-1].path, opened[-1].manifest, same_text, to_append=False)
    weights = [store.weight for store in data.stores if store.weight is not None]
    return StoredRows(
        opened,
        weights=weights or None,
        epochs=data.epochs,
        seed=config.seed,
        read_block=data.store_read_block,
        window=data.shuffle_buffer_size or DEFAULT_CAPACITY,
    )


def _open(store: StoreConfig) -> ActivationCache:
    opened = ActivationCache(store.path)
    if opened.n_rows == 0:
        raise InputError(f"store {store.path!r} holds no whole shard yet")
    return opened


def _with_text_of(store: ActivationCache, wanted: Manifest, documents: DocumentSource) -> Manifest:
    """`wanted` of the part of a mixture that the store holds, or of the whole text."""
    texts = {part.fingerprint for part in parts_of(documents)}
    held = store.manifest["tokens"]["dataset"]
    text = held if held in texts else documents.fingerprint
    return {**wanted, "tokens": {**wanted["tokens"], "dataset": text}}
