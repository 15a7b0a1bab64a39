"""Config -> texts, language models, rows of activations."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from crosscode.build.stores import Stores
from crosscode.config.data import (
    DataConfig,
    DemoCorpus,
    HarvestConfig,
    HubDataset,
    LanguageModelConfig,
    LocalDataset,
    Mixture,
)
from crosscode.data.harvest.harvester import ActivationHarvester
from crosscode.data.harvest.language_models import LanguageModel, available_device, load_language_model
from crosscode.data.rows import HarvestedRows, RowSource
from crosscode.data.store.harvest import HarvestThroughStore
from crosscode.data.text.documents import DocumentSource
from crosscode.data.text.mixture import MixedDocuments, parts_of
from crosscode.data.text.sources import load_documents, wrap_documents
from crosscode.data.text.token_chunks import is_on_side
from crosscode.data.text.tokens import TokenSequenceLoader
from crosscode.demo import demo_model_path
from crosscode.errors import InputError, at_field, in_section

log = logging.getLogger("crosscode")

_ENOUGH_FOR_VALIDATION = 20
"""Expected documents of the validation split among so many that were read that one is there, but for e^-20."""

# ---- language models


def load_model(config: LanguageModelConfig, field: str, default_device: str) -> LanguageModel:
    """A language model; `field` is its place in the config, for messages."""
    with at_field(f"{field}.path = {config.path!r}"):
        log.info("loading language model %s", config.path)
        options = config.model_dump(exclude={"path", "name", "device"})
        return load_language_model(locate(config.path), device=config.device or default_device, **options)


def locate(path: str) -> str:
    """The folder or file of an embedded model (`demo:NAME`) or of one that a package ships (`package:NAME/FILE`)."""
    scheme, _, rest = path.partition(":")
    if scheme == "demo":
        return str(demo_model_path(rest))
    if scheme != "package":
        return path
    package, _, file = rest.partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        raise InputError(
            f"the Python package {package!r} is not installed; try: pip install {package.replace('_', '-')}"
        )
    return str(Path(spec.origin).parent / file)


# ---- texts


def build_documents(source: Any, field: str) -> DocumentSource:
    """The documents of a configured source. `field` is its place in the config, for messages."""
    with at_field(field, type(source).model_fields):
        return _open_documents(source)


def _open_documents(source: Any) -> DocumentSource:
    if isinstance(source, Mixture):
        parts = [build_documents(part.source, f"parts.{i}.source") for i, part in enumerate(source.parts)]
        return MixedDocuments(parts, [part.weight for part in source.parts], stop=source.stop)
    if isinstance(source, DemoCorpus):
        from crosscode.demo.corpus import demo_corpus

        name = f"demo corpus ({source.split}: {', '.join(source.domains)})"
        return wrap_documents(demo_corpus(source.split, tuple(source.domains)), column="text", name=name)
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
        return self.harvester.models[0].tokenizer


def open_activations(
    config: HarvestConfig, models: Sequence[LanguageModel] | None = None, *, to_train: bool = True
) -> dict[str, Any]:
    """The fields of `Activations`: everything is checked that can be, then the language models are loaded.

    `models` stand in for those that the config names. `to_train=False` leaves stores alone.

    Raises:
        InputError: naming the field, its value and what would be right.
    """
    if models is not None and len(models) != len(config.language_models):
        raise InputError(f"models: {len(models)} were given, but language_models names {len(config.language_models)}")
    device = available_device(config.device)
    stores = Stores.open(config, models) if to_train else None
    documents = build_documents(config.data.source, "data.source")
    heldout = config.data.heldout
    heldout_documents = documents if heldout is None else build_documents(heldout, "data.heldout")
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
        check_validation_split(config, documents)
        stores.check_text(documents)
    if models is None:
        models = [load_model(lm, f"language_models.{i}", str(device)) for i, lm in enumerate(config.language_models)]
    harvester = ActivationHarvester(models, config.hookpoints, dtype=config.data.activation_dtype, device=device)
    return {
        "documents": documents, "heldout_documents": heldout_documents, "harvester": harvester, "stores": stores,
    }  # fmt: skip


def check_validation_split(config: HarvestConfig, documents: DocumentSource) -> None:
    """Raise InputError where no document is left for evaluation, before training rather than at its end."""
    if config.data.heldout is not None:
        return
    fraction = config.data.validation_fraction
    policy = config.token_policy(heldout=True)
    n_enough, n_read = int(_ENOUGH_FOR_VALIDATION / fraction), 0
    for document in islice(documents.open(), n_enough):
        if is_on_side(document, policy):
            return
        n_read += 1
    if n_read < n_enough:
        raise InputError(
            f"data.validation_fraction = {fraction}: no document of the {n_read} in data.source is left for evaluation; "
            "raise it, name other text as data.heldout, or cut the text into more documents (text_unit: paragraph)"
        )


def build_token_loader(activations: Activations, *, heldout: bool) -> TokenSequenceLoader:
    documents = activations.heldout_documents if heldout else activations.documents
    with in_section("data", DataConfig.model_fields):
        return TokenSequenceLoader(documents, activations.tokenizer, activations.config.token_policy(heldout=heldout))


def build_rows(activations: Activations) -> RowSource:
    """Rows to train on: out of stores, harvested, or harvested into a store."""
    data = activations.config.data
    tokens = build_token_loader(activations, heldout=False)
    if data.stores:
        stores = activations.stores or Stores.open(activations.config, activations.harvester.models)
        return stores.rows(tokens, activations.harvester)
    if data.cache is None:
        with in_section("data", DataConfig.model_fields):
            return HarvestedRows(tokens, activations.harvester)
    with at_field("data.cache"):
        return HarvestThroughStore(tokens, activations.harvester, data.cache.path, **data.cache.arguments())
