"""What a command that runs language models over text, and trains nothing, reads of a run's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crosscode.config.checked import checked
from crosscode.config.data import HarvestConfig
from crosscode.config.experiment import ExperimentConfig


def text_config(values: Mapping[str, Any]) -> HarvestConfig:
    """The fields of a harvest among a run's values; stores that the run reads are not looked at.

    Raises:
        InputError: naming each bad field, its value and what is allowed.
    """
    own = HarvestConfig.model_fields
    kept = {name: value for name, value in values.items() if name in own or name not in ExperimentConfig.model_fields}
    if isinstance(kept.get("data"), Mapping):
        kept["data"] = {name: value for name, value in kept["data"].items() if name not in ("stores", "join")}
    return checked(HarvestConfig, kept)
