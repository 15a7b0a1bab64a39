"""Config -> texts, language models, rows of activations."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from crosscode.build.language_models import load_models, load_readers
from crosscode.build.rollouts import open_rollouts
from crosscode.build.stores import Stores
from crosscode.config.data import DataConfig, HarvestConfig
from crosscode.config.language_models import LanguageModelConfig
from crosscode.config.sources import DemoCorpus, HubDataset, LocalDataset, Mixture, Rollouts
from crosscode.data.harvest.harvester import ActivationHarvester
from crosscode.data.harvest.language_models import LanguageModel, available_device, by_tokenizer
from crosscode.data.rows import HarvestedRows, RowSource
from crosscode.data.store.harvest import HarvestThroughStore
from crosscode.data.text.documents import DocumentSource
from crosscode.data.text.mixture import MixedDocuments, parts_of
from crosscode.data.text.sources import load_documents, wrap_documents
from crosscode.data.text.token_chunks import is_on_side
from crosscode.data.text.tokens import TokenSequenceLoader
from crosscode.errors import InputError, at_field, in_section
from crosscode.parallel.harvest import alone, over_ranks
from crosscode.parallel.teams import Teams

_ENOUGH_FOR_VALIDATION = 20
"""Expected documents of the validation split among so many that were read that one is there, but for e^-20."""

log = logging.getLogger("crosscode")

# ---- texts


def build_documents(source: Any, field: str, device: str = "auto") -> DocumentSource:
    """The documents of a configured source. `field` is its place in the config, for messages; `device` where a language
    model writes them, if one does and names none."""
    with at_field(field, type(source).model_fields):
        return _open_documents(source, device)


def _open_documents(source: Any, device: str) -> DocumentSource:
    if isinstance(source, Mixture):
        parts = [build_documents(part.source, f"parts.{i}.source", device) for i, part in enumerate(source.parts)]
        return MixedDocuments(parts, [part.weight for part in source.parts], stop=source.stop)
    if isinstance(source, DemoCorpus):
        from crosscode.demo.plants import planted_corpus

        name = f"demo corpus ({source.split}: {', '.join(source.domains)}{f', {source.plant}' if source.plant else ''})"
        corpus = planted_corpus(source.plant, source.split, tuple(source.domains))
        return wrap_documents(corpus, column="text", name=name)
    if isinstance(source, Rollouts):
        return open_rollouts(source, build_documents(source.prompts, "prompts"), device)
    if isinstance(source, HubDataset):
        return load_documents(source.name, **source.model_dump(exclude={"type", "name"}))
    assert isinstance(source, LocalDataset)
    if not Path(source.path).expanduser().exists():
        raise InputError(f"path = {source.path!r}: no such file or folder")
    return load_documents(source.path, **source.model_dump(exclude={"type", "path"}))


# ---- activations


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Texts and language models, opened."""

    config: HarvestConfig
    documents: DocumentSource
    heldout_documents: DocumentSource
    harvester: ActivationHarvester
    stores: Stores | None = None

    @property
    def tokenizer(self) -> Any:
        return self.harvester.tokenizer


def open_activations(
    config: HarvestConfig,
    models: Sequence[LanguageModel] | None = None,
    *,
    to_train: bool = True,
    batch_size: int = 1,
    together: Sequence[LanguageModelConfig] = (),
) -> dict[str, Any]:
    """The fields of `Activations`: everything is checked that can be, then the language models are loaded.

    `models` stand in for those that the config names. `to_train=False` leaves stores alone; else the text
    must fill a batch of `batch_size` activations. `together`: all language models of a text of which the config names a
    part; the others are known by their configurations and tokenizers.

    Raises:
        InputError: naming the field, its value and what would be right.
    """
    if models is not None and len(models) != len(config.language_models):
        raise InputError(f"models: {len(models)} were given, but language_models names {len(config.language_models)}")
    device = available_device(config.device)
    stores = Stores.open(config, models) if to_train else None
    heldout = config.data.heldout
    # First, as what is wrong there should be said before a language model writes the text to train on.
    separate = None if heldout is None else build_documents(heldout, "data.heldout", config.device)
    documents = build_documents(config.data.source, "data.source", config.device)
    heldout_documents = documents if separate is None else separate
    if heldout is not None and heldout_documents.fingerprint == documents.fingerprint:
        raise InputError(
            f"data.heldout: the same text as data.source ({documents.name}); leave it null, and a share of "
            "data.source that training never sees is kept for evaluation"
        )
    for part in parts_of(documents) if heldout is not None else ():
        if part.fingerprint == heldout_documents.fingerprint:
            raise InputError(
                f"data.heldout: the same text as a part of data.source ({part.name}); training would see it"
            )
    if stores is not None:
        check_documents(config, documents)
        stores.check_text(documents)
    if models is None:
        models = load_models(config.language_models, str(device), Teams.of(config))
    names = [lm.short_name() for lm in config.language_models]
    readers = load_readers(together, dict(zip(names, models, strict=True))) or models
    if to_train:
        tokenizer, others = readers[0].tokenizer, by_tokenizer(readers)[1]
        check_usable(config, documents, tokenizer, others, field="data.source", least=batch_size)
        if heldout is not None:
            check_usable(config, heldout_documents, tokenizer, others, field="data.heldout", heldout=True)
    harvester = ActivationHarvester(
        models, config.hookpoints, dtype=config.data.activation_dtype, device=device, readers=readers
    )
    return {
        "documents": documents, "heldout_documents": heldout_documents, "stores": stores,
        "harvester": over_ranks(Teams.of(config), harvester),
    }  # fmt: skip


def check_documents(config: HarvestConfig, documents: DocumentSource) -> None:
    """Raise InputError where all documents are the same, or one side of the validation split gets none."""
    fraction = config.data.validation_fraction
    policies = [] if config.data.heldout is not None else [config.token_policy(heldout=side) for side in (True, False)]
    # As many as leave none on one side with a probability of e^-20.
    n_enough = int(_ENOUGH_FOR_VALIDATION / min(fraction, 1 - fraction))
    sides: set[bool] = set()
    first, all_same, n_read = None, True, 0
    for document in islice(documents.open(), n_enough):
        n_read += 1
        first = document if n_read == 1 else first
        all_same &= document == first
        sides |= {policy.split == "validation" for policy in policies if is_on_side(document, policy)}
        if not all_same and len(sides) == len(policies):
            return
    if all_same and n_read > 1:
        raise InputError(
            f"data.source: the {n_read} documents that it begins with are all the same; give a text of several"
        )
    if n_read < n_enough and len(sides) < len(policies):
        side, change = ("training", "lower") if True in sides else ("evaluation", "raise")
        raise InputError(
            f"data.validation_fraction = {fraction}: no document of the {n_read} in data.source is left for {side}; "
            f"{change} it, name other text as data.heldout, or cut the text into more documents (text_unit: paragraph)"
        )


def check_usable(
    config: HarvestConfig,
    documents: DocumentSource,
    tokenizer: Any,
    others: Sequence[tuple[Any, int | None]] = (),
    *,
    field: str,
    heldout: bool = False,
    least: int = 1,
) -> None:
    """Raise InputError where the beginning of a text cannot be made into tokens, or where the whole of it has fewer
    usable tokens than `least`. Where tokenizers differ, say how many positions have no partner."""
    with at_field(field):
        policy = config.token_policy(heldout=heldout)
        loader = TokenSequenceLoader(documents, tokenizer, policy, others=others, epochs=1, n_workers=0)
        n_usable = n_apart = 0
        for batch in loader:
            n_usable += int(batch.mask_HS.sum())
            n_apart += batch.n_apart
            if n_usable >= least:
                if others:
                    share = n_apart / (n_usable + n_apart)
                    log.info("different tokenizers: %.1f %% of positions have no partner and are left out", 100 * share)
                return
        raise InputError(
            f"{documents.name!r} has {n_usable} usable tokens, less than one batch; give more text, or set "
            f"train.batch_size (now {least}) to at most {n_usable}"
        )


def build_token_loader(activations: Activations, *, heldout: bool) -> TokenSequenceLoader:
    documents = activations.heldout_documents if heldout else activations.documents
    with in_section("data", DataConfig.model_fields):
        policy, others = activations.config.token_policy(heldout=heldout), activations.harvester.other_tokenizers
        return TokenSequenceLoader(documents, activations.tokenizer, policy, others=others)


def build_rows(activations: Activations) -> RowSource:
    """Rows to train on: out of stores, harvested, or harvested into a store."""
    data = activations.config.data
    tokens = build_token_loader(activations, heldout=False)
    if data.reads_stores():
        stores = activations.stores or Stores.open(activations.config, activations.harvester.models)
        return stores.rows(tokens, alone(activations.harvester))
    if data.cache is None:
        with in_section("data", DataConfig.model_fields):
            return HarvestedRows(tokens, activations.harvester)
    with at_field("data.cache"):
        return HarvestThroughStore(tokens, alone(activations.harvester), data.cache.path, **data.cache.arguments())
