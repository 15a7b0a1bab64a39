"""Text to batches of activations: models, sources, tokens, harvest, store, shuffled and scaled batches."""

from crosscode.data.dataloader import ActivationsDataloader
from crosscode.data.harvest.harvester import ActivationHarvester, check_hookpoints
from crosscode.data.harvest.language_models import (
    LanguageModel,
    wrap_language_model,
)
from crosscode.data.harvest.loading import load_language_model, load_skeleton
from crosscode.data.store.format import StoreError
from crosscode.data.store.harvest import HarvestThroughStore, harvest_to_store
from crosscode.data.store.manifest import make_manifest
from crosscode.data.store.reader import ActivationCache
from crosscode.data.store.rows import StoredRows
from crosscode.data.store.writer import ActivationCacheWriter
from crosscode.data.text.documents import DocumentSource
from crosscode.data.text.mixture import MixedDocuments
from crosscode.data.text.sources import load_documents, wrap_documents
from crosscode.data.text.token_batch import TokenBatch
from crosscode.data.text.tokens import TokenSequenceLoader

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
    "check_hookpoints",
    "harvest_to_store",
    "load_documents",
    "load_language_model",
    "load_skeleton",
    "make_manifest",
    "wrap_documents",
    "wrap_language_model",
]
