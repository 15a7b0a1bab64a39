"""What a store holds, in one file, and whether that is what a run wants.

Models are recognised by a fingerprint of their weights, not by their name: a folder that was moved is the same model.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

from crosscode.config.nested import flatten
from crosscode.data.harvest.harvester import ActivationHarvester
from crosscode.data.harvest.language_models import LanguageModel
from crosscode.data.schemas import StoreManifest
from crosscode.data.store.format import STORE_DTYPES, Layout, StoreError
from crosscode.data.store.place import Place, RemotePath, write_whole
from crosscode.data.text.tokens import TokenSequenceLoader
from crosscode.errors import InputError
from crosscode.formats import STORE
from crosscode.stored import check, parse_json

_FILE = "manifest.json"
UNFINISHED = "manifest.unfinished.json"
"""Its name until the harvest ends, where a manifest says that a store is there: remotely, and where ranks write."""
_FORMAT = "crosscode-activations"
_ONLY_NAMES = (".name", ".revision")
_HOW_IT_IS_WRITTEN = ("version",)
_ORDER_OF_ROWS = ("tokens.seed", "tokens.shuffle", "tokens.batch_size", "tokens.worker")
_ROUNDING = ("dtype", "activation_dtype")
Manifest = dict[str, Any]


def make_manifest(token_loader: TokenSequenceLoader, harvester: ActivationHarvester, *, dtype: str) -> Manifest:
    """The manifest of a store that holds what `harvester` makes of `token_loader`. Reads every weight once."""
    if dtype not in STORE_DTYPES:
        raise InputError(f"store dtype: {dtype!r} is not one of {', '.join(STORE_DTYPES)}")
    models = [
        {
            "name": model.name,
            "revision": model.revision,
            "weights": model.fingerprint(),
            "dtype": dtype_name(model),
        }
        for model in harvester.models
    ]
    return {
        "format": _FORMAT,
        **STORE.stamp(),
        "models": models,
        "tokenizer": tokenizer_fingerprint(token_loader.tokenizer),
        "hookpoints": harvester.hookpoints,
        "dims": list(harvester.dims),
        "dtype": dtype,
        "activation_dtype": str(harvester.dtype).removeprefix("torch."),
        "tokens": json.loads(token_loader.describe()),
        "sources": [{"name": name} for name in token_loader.source_names],
    }


def dtype_name(model: LanguageModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """16 hex digits of the vocabulary and the special tokens; "none" without a tokenizer. All that is known of the
    tokenizer of stores without `tokens.tokenizer`, which says more."""
    if tokenizer is None:
        return "none"
    content = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_ids)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def content_id(manifest: Manifest) -> str:
    """8 hex digits of what a store holds, wherever it lies and whatever its models are called."""
    return _checksum({name: value for name, value in flatten(manifest) if not name.endswith(_ONLY_NAMES)})


def layout_of(manifest: Manifest) -> Layout:
    M, P, D = manifest["dims"]
    return Layout((M, P, D), manifest["dtype"])


def write_manifest(folder: Place, manifest: Manifest, name: str = _FILE) -> None:
    text = json.dumps({**manifest, "checksum": _checksum(manifest)}, indent=1)
    write_whole(folder / name, [text.encode()])


def read_manifest(folder: Place, name: str = _FILE) -> Manifest | None:
    """The manifest of a store, or None where there is none. Raises StoreError for a damaged or a foreign one."""
    path = folder / name
    if not path.exists():
        return None
    manifest = parse_json(path.read_bytes(), dict[str, Any], str(path), StoreError)
    checksum = manifest.pop("checksum", None)
    if manifest.get("format") != _FORMAT:
        raise StoreError(f"store: {str(path)!r} is not the manifest of an activation store")
    if checksum != _checksum(manifest):
        raise StoreError(f"store: {str(path)!r} does not match its checksum; it was damaged or edited")
    where = f"store: {str(path)!r}"
    STORE.read(manifest, where, StoreError)  # but as it stands, its fields name its shards
    return check(manifest, StoreManifest, where, StoreError)


def check_same_content(
    store: object, stored: Manifest, wanted: Manifest, *, to_append: bool, partly: bool = False
) -> None:
    """Raise StoreError naming the first field in which a store (its folder, or what says its name) differs from what a run wants.

    To read, the order of the rows and their rounding (on disk and before) are no matter; to append, they are.
    `partly`: fields that `wanted` does not have are no matter either.
    """
    named = f"store {str(store)!r}" if isinstance(store, (Path, RemotePath)) else str(store)
    ignored = _HOW_IT_IS_WRITTEN if to_append else (*_HOW_IT_IS_WRITTEN, *_ROUNDING, *_ORDER_OF_ROWS)
    names_stored, names_wanted = ([model["name"] for model in manifest["models"]] for manifest in (stored, wanted))
    if len(names_stored) != len(names_wanted):
        raise StoreError(
            f"{named} holds other data: models is {names_stored} in the store and {names_wanted} in this run"
        )
    if all(manifest["tokens"].get("tokenizer") for manifest in (stored, wanted)):
        ignored = (*ignored, "tokenizer")
    flat_stored, flat_wanted = ({**STORE.defaults, **dict(flatten(manifest))} for manifest in (stored, wanted))
    for field in flat_wanted if partly else dict.fromkeys([*flat_wanted, *flat_stored]):
        mine, theirs = flat_wanted.get(field), flat_stored.get(field)
        if field == "tokens.tokenizer" and field not in flat_stored:
            continue
        if mine != theirs and field not in ignored and not field.endswith(_ONLY_NAMES):
            raise StoreError(
                f"{named} holds other data: {field} is {theirs!r} in the store and {mine!r} in this run"
                f"{_name_models(field, stored, wanted)}"
            )


def _name_models(field: str, stored: Manifest, wanted: Manifest) -> str:
    parts = field.split(".")
    if parts[0] != "models":
        return ""
    names = [manifest["models"][int(parts[1])]["name"] for manifest in (stored, wanted)]
    weights = [sorted(str(model.get("weights")) for model in manifest["models"]) for manifest in (stored, wanted)]
    order = "; they are in another order than language_models" if weights[0] == weights[1] else ""
    return f" (models {names[0]!r} and {names[1]!r}{order})"


def _checksum(content: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
