"""The stores that a config names: checked before anything is loaded, opened once it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crosscode.config.data import HarvestConfig
from crosscode.config.experiment import ExperimentConfig
from crosscode.data.harvest.harvester import ActivationHarvester
from crosscode.data.harvest.language_models import LanguageModel
from crosscode.data.shuffle import DEFAULT_CAPACITY
from crosscode.data.store.beginning import check_can_write
from crosscode.data.store.joined import JoinedStores
from crosscode.data.store.manifest import Manifest, check_same_content, dtype_name, make_manifest
from crosscode.data.store.place import is_url, place
from crosscode.data.store.reader import ActivationCache
from crosscode.data.store.rows import StoredRows
from crosscode.data.text.documents import DocumentSource
from crosscode.data.text.mixture import parts_of
from crosscode.data.text.tokens import TokenSequenceLoader
from crosscode.errors import InputError, at_field
from crosscode.files import check_may_be_filled
from crosscode.parallel.group import is_first


@dataclass(frozen=True)
class Stores:
    """The stores that a config names, opened once for a whole run, and as much of their manifests as is known yet."""

    config: HarvestConfig
    wanted: Manifest
    opened: dict[str, ActivationCache | JoinedStores]
    """by their fields"""
    written: Manifest | None
    """what `data.cache` holds already"""

    @classmethod
    def open(cls, config: HarvestConfig, models: Sequence[LanguageModel] | None = None) -> Stores:
        """Refuse a store that is damaged, or that does not hold what the config asks for.

        What takes the text is left to `check_text`; what takes a loaded language model (weights, tokenizer), to `rows`
        and the writer. `models`: those in memory, if the config's are not what is used.
        """
        loaded = [{"name": model.name, "dtype": dtype_name(model)} for model in models or ()]
        named = [
            {"name": " + ".join(filter(None, (lm.path, lm.adapter)))}
            | ({} if lm.dtype == "auto" else {"dtype": lm.dtype})
            for lm in config.language_models
        ]
        wanted: Manifest = {
            "models": loaded or named,
            "hookpoints": config.hookpoints,
            "tokens": config.token_policy().recorded(),
        }
        cache, written = config.data.cache, None
        if cache is not None:
            if not is_url(cache.path):
                check_may_be_filled(str(place(cache.path)), "data.cache.path")
            dtypes = {"dtype": cache.dtype, "activation_dtype": config.data.activation_dtype}
            with at_field("data.cache"):
                written = check_can_write(cache.path, {**wanted, **dtypes}, to_hold=is_first())
        opened: dict[str, ActivationCache | JoinedStores] = {}
        for i, named in enumerate(config.data.stores or [None] * bool(config.data.join)):
            field = "data.join" if named is None else f"data.stores.{i}"
            with at_field(field):
                store = JoinedStores(config.data.join) if named is None else ActivationCache(named.path)
                store.check_not_empty()
                check_same_content(store, store.manifest, wanted, to_append=False, partly=True)
                opened[field] = store
        return cls(config, wanted, opened, written)

    def check_text(self, documents: DocumentSource) -> None:
        """Refuse a store of another text than this, or a part of this."""
        cache = self.config.data.cache
        if cache is not None and self.written is not None:
            wanted = _of_text(self.wanted, documents.fingerprint)
            with at_field("data.cache"):
                check_same_content(place(cache.path), self.written, wanted, to_append=True, partly=True)
        self._check_all(self.wanted, documents, partly=True)

    def rows(self, tokens: TokenSequenceLoader, harvester: ActivationHarvester) -> StoredRows:
        """Their rows; each store holds what `harvester` would make of `tokens`' text or of a part of it."""
        data = self.config.data
        self._check_all(make_manifest(tokens, harvester, dtype="float32"), tokens.source)
        weights = [store.weight for store in data.stores if store.weight is not None]
        return StoredRows(
            list(self.opened.values()),
            weights=weights or None,
            epochs=data.epochs,
            seed=self.config.seed,
            read_block=data.store_read_block,
            window=data.shuffle_buffer_size or DEFAULT_CAPACITY,
        )

    def _check_all(self, wanted: Manifest, documents: DocumentSource, *, partly: bool = False) -> None:
        """Each may hold a part of a mixture, or the whole text."""
        texts = {part.fingerprint for part in parts_of(documents)}
        for field, store in self.opened.items():
            held = store.manifest["tokens"]["dataset"]
            of_text = _of_text(wanted, held if held in texts else documents.fingerprint)
            with at_field(field):
                check_same_content(store, store.manifest, of_text, to_append=False, partly=partly)


def check_stores_outside(config: ExperimentConfig) -> None:
    """Refuse a store inside the new run's own directory, where only the run belongs."""
    run = config.run_path().resolve()
    cache = config.data.cache
    paths = {f"data.stores.{i}": store.path for i, store in enumerate(config.data.stores)}
    paths |= {f"data.join.{i}": path for i, path in enumerate(config.data.join)}
    paths |= {} if cache is None else {"data.cache.path": cache.path}
    for field, path in paths.items():
        if not is_url(path) and Path(str(place(path))).resolve().is_relative_to(run):
            raise InputError(
                f"{field} = {path!r}: is inside the run directory {str(config.run_path())!r}; put the store beside it"
            )


def _of_text(manifest: Manifest, fingerprint: str) -> Manifest:
    return {**manifest, "tokens": {**manifest["tokens"], "dataset": fingerprint}}
