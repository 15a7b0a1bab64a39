"""Text to batches of activations: models, sources, tokens, harvest, store, shuffled and scaled batches."""

from crosscode.data.dataloader import ActivationsDataloader
from crosscode.data.documents import DocumentSource
from crosscode.data.harvester import ActivationHarvester, check_hookpoints
from crosscode.data.language_models import (
    LanguageModel,
    check_common_tokenizer,
    load_language_model,
    load_skeleton,
    wrap_language_model,
)
from crosscode.data.mixture import MixedDocuments
from crosscode.data.sources import load_documents, wrap_documents
from crosscode.data.store import ActivationCache
from crosscode.data.store_format import StoreError
from crosscode.data.store_harvest import HarvestThroughStore, harvest_to_store
from crosscode.data.store_manifest import make_manifest
from crosscode.data.store_rows import StoredRows
from crosscode.data.store_writer import ActivationCacheWriter
from crosscode.data.tokens import TokenBatch, TokenSequenceLoader

__all__ = [
    "ActivationCache",
    "ActivationCacheWriter",
    "ActivationHarvester",
    "ActivationsDataloader",
    "DocumentSource",
    "HarvestThroughStore",
    "LanguageModel",
    "MixedDocuments",
    "StoreError",
    "StoredRows",
    "TokenBatch",
    "TokenSequenceLoader",
    "check_common_tokenizer",
    "check_hookpoints",
    "harvest_to_store",
    "load_documents",
    "load_language_model",
    "load_skeleton",
    "make_manifest",
    "wrap_documents",
    "wrap_language_model",
]
