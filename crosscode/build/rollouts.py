"""Config -> what a language model writes: looked for where it is kept, or generated, once all that can be is checked."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

from crosscode.build.foresight import check_weights, skeleton_of
from crosscode.build.language_models import load_model, locate
from crosscode.config.language_models import LanguageModelConfig
from crosscode.config.sources import Rollouts
from crosscode.data.harvest.language_models import LanguageModel
from crosscode.data.harvest.loading import files_id
from crosscode.data.rollouts import RolloutFolder, wrap_rollouts
from crosscode.data.text.documents import DocumentSource
from crosscode.errors import InputError, at_field
from crosscode.files import check_may_be_filled
from crosscode.parallel.group import n_ranks
from crosscode.trainers.progress import Progress

log = logging.getLogger("crosscode")

_OF_PLACE = ("type", "model", "prompts", "folder")
_OF_FILES = ("revision", "gguf_file", "adapter", "adapter_revision")
_OF_NUMBERS = ("adapter_scale", "dtype", "attn_implementation", "quantization")


def open_rollouts(rules: Rollouts, prompts: DocumentSource, device: str) -> DocumentSource:
    """The rollouts, generated now where they are not kept yet; the language model is loaded only then, and let go.

    Raises:
        InputError: naming the field, its value and what would be right.
    """
    model = rules.model
    assert isinstance(model, LanguageModelConfig)
    folder = _folder(rules, model, prompts)
    documents = folder.whole()
    if documents is None:
        if n_ranks() > 1:
            raise InputError(
                "model: its rollouts are not written yet, which one process does: crosscode harvest without torchrun"
            )
        _check(rules, model, device)
        log.info(
            "rollouts of %s, of at most %d new tokens each, go to %s", model.short_name(), rules.max_new_tokens, folder
        )
        with Progress(None, what="rollouts", unit="prompt") as shown:
            folder.fill(rules, prompts, _load(model, device), lambda done, n: shown.show(done, f"of {n}"))
        documents = folder.whole()
    if not documents:
        raise InputError(f"model: {model.short_name()} has answered no prompt of {prompts.name!r}")
    return wrap_rollouts(documents, rules)


def _folder(rules: Rollouts, model: LanguageModelConfig, prompts: DocumentSource) -> RolloutFolder:
    """Where they are kept, by all that decides them."""
    with at_field("model"):
        files = files_id(locate(model.path), **model.model_dump(include={*_OF_FILES}))
    recipe = {
        **rules.model_dump(mode="json", exclude={*_OF_PLACE}),
        "model": {
            "files": files,
            **model.model_dump(mode="json", include={*_OF_NUMBERS}),
            **model.model_dump(include={"adapter_dtype"}, exclude_defaults=True),
        },
        "prompts": prompts.fingerprint,
    }
    if rules.folder is not None:
        check_may_be_filled(rules.folder, "folder")
        return RolloutFolder(Path(rules.folder).expanduser(), recipe)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    name = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    return RolloutFolder(cache / "crosscode" / "rollouts" / name, recipe)


def _check(rules: Rollouts, model: LanguageModelConfig, device: str) -> None:
    """Raise `InputError` for what can be told from the model's configuration."""
    skeleton = skeleton_of(model, "model")
    if skeleton is None:
        return
    limit = skeleton.max_sequence_length
    if limit is not None and rules.max_new_tokens >= limit:
        raise InputError(
            f"max_new_tokens = {rules.max_new_tokens}: {model.short_name()} takes {limit} positions, the prompt among them"
        )
    check_weights(model, "model", skeleton, device, {})


def _load(model: LanguageModelConfig, device: str) -> LanguageModel:
    with at_field(f"model.path = {model.path!r}"):
        return load_model(model, device, {})
