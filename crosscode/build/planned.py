"""What a config would train, before it is trained: whether another library could hold it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from crosscode.build.experiment import build_model, check_parts
from crosscode.build.foresight import check_language_models, skeleton_of
from crosscode.build.schema import check_config
from crosscode.config.experiment import ExperimentConfig
from crosscode.config.reading import read_trusted
from crosscode.interop.export import check_holds, planned, writing_format
from crosscode.models import BaseCrosscoder
from crosscode.models.architecture import split_for

_SOME_WIDTH = 4096
"""where the language models are not here to ask"""


def check_export(configs: Sequence[str], to: str, position: str | None = None, trust_remote_code: bool = False) -> str:
    """A line that says that the models of these configs could be exported, and what is still wanted for it.

    Args:
        configs: files, run directories or recipes.
        trust_remote_code: as of `read_trusted`.

    Raises:
        InputError: why they could not, and what would work.
    """
    made = writing_format(to)
    read = [check_config(read_trusted(config, trust_remote_code)) for config in configs]
    coders = [coder for config in read for coder in planned(planned_model(config), position)]
    check_holds(made, coders, complete=False)
    return "; ".join([f"{', '.join(configs)}: can be exported to {to}", *made.notes(coders)])


def planned_model(config: ExperimentConfig) -> BaseCrosscoder:
    """The model of a config on the meta device, with what it will say of itself. Of language models the configurations alone
    are read."""
    split = split_for(config.crosscoder.type)
    split.check(*config.n_positions())
    widths_MP = check_language_models(config)
    if widths_MP is not None:
        check_parts(config, widths_MP)
    with torch.device("meta"):
        model = build_model(config, widths_MP.widest if widths_MP else _SOME_WIDTH, widths_MP or ())
    model.metadata = {
        "language_models": [_facts(lm, i) for i, lm in enumerate(config.language_models)],
        "hookpoints": config.hookpoints,
        "output_positions": split.output_names(config.position_names()),
        "architecture": config.crosscoder.type,
    }
    return model


def _facts(lm: Any, index: int) -> dict[str, Any]:
    skeleton = skeleton_of(lm, f"language_models.{index}")
    return {"path": lm.path, "name": lm.short_name()} | ({} if skeleton is None else skeleton.facts())
