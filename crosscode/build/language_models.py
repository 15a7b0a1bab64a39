"""Config -> language models."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from crosscode.config.language_models import LanguageModelConfig
from crosscode.data.harvest.language_models import LanguageModel
from crosscode.data.harvest.loading import load_language_model, load_skeleton
from crosscode.demo import demo_model_path
from crosscode.errors import InputError, at_field
from crosscode.parallel.teams import Teams

log = logging.getLogger("crosscode")


def load_models(
    configs: Sequence[LanguageModelConfig], default_device: str, teams: Teams | None = None
) -> list[LanguageModel]:
    """The language models of a config; those of one base hold its weights once. Of several ranks each loads what its team
    holds, and knows of the others what their configurations and the ranks that hold them say."""
    loaded: dict[Any, LanguageModel] = {}
    models = []
    for i, config in enumerate(configs):
        with at_field(f"language_models.{i}.path = {config.path!r}"):
            if teams is not None and not teams.holds(i):
                models.append(_without_weights(config))
            else:
                models.append(load_model(config, default_device, loaded, 1 if teams is None else teams.size))
    return models if teams is None else teams.told(models)


def load_model(
    config: LanguageModelConfig, default_device: str, loaded: dict[Any, LanguageModel], n_ranks: int = 1
) -> LanguageModel:
    """One of them. `loaded`, `n_ranks`: as of `load_language_model`."""
    adapter = "" if config.adapter is None else f" with adapter {config.adapter}"
    log.info("loading language model %s%s", config.path, adapter)
    options = config.model_dump(exclude={"path", "name", "device"})
    device = config.device or default_device
    return load_language_model(locate(config.path), device=device, loaded=loaded, n_ranks=n_ranks, **options)


def load_readers(configs: Sequence[LanguageModelConfig], loaded: Mapping[str, LanguageModel]) -> list[LanguageModel]:
    """The language models of one text, of which some are `loaded`, by name; of the others what decides their tokens."""
    readers = []
    for i, config in enumerate(configs):
        with at_field(f"language_models.{i}.path = {config.path!r}"):
            readers.append(loaded.get(config.short_name()) or _without_weights(config))
    return readers


def _without_weights(config: LanguageModelConfig) -> LanguageModel:
    """Its configuration and tokenizer, which a GGUF file has only with its weights."""
    if config.is_gguf:
        return load_model(config, "cpu", {})
    rules = config.model_dump(include={"revision", "trust_remote_code", "adapter", "adapter_revision"})
    return load_skeleton(locate(config.path), **rules, with_tokenizer=True)


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
