"""Config -> language models."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from crosscode.config.language_models import LanguageModelConfig
from crosscode.data.harvest.language_models import LanguageModel
from crosscode.data.harvest.loading import load_language_model
from crosscode.demo import demo_model_path
from crosscode.errors import InputError, at_field

log = logging.getLogger("crosscode")


def load_models(configs: Sequence[LanguageModelConfig], default_device: str) -> list[LanguageModel]:
    """The language models of a config; those of one base hold its weights once."""
    loaded: dict[Any, LanguageModel] = {}
    models = []
    for i, config in enumerate(configs):
        with at_field(f"language_models.{i}.path = {config.path!r}"):
            models.append(load_model(config, default_device, loaded))
    return models


def load_model(config: LanguageModelConfig, default_device: str, loaded: dict[Any, LanguageModel]) -> LanguageModel:
    """One of them. `loaded`: as of `load_language_model`."""
    adapter = "" if config.adapter is None else f" with adapter {config.adapter}"
    log.info("loading language model %s%s", config.path, adapter)
    options = config.model_dump(exclude={"path", "name", "device"})
    return load_language_model(locate(config.path), device=config.device or default_device, loaded=loaded, **options)


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
