"""`crosscode synthetic`: which scheme recovers what of a planted dictionary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from crosscode.commands.parts.command import Command
from crosscode.config.checked import checked
from crosscode.config.registry import ConfigModel
from crosscode.files import check_output, json_text, write_output
from crosscode.synthetic.config import SyntheticConfig
from crosscode.synthetic.schemes import SCHEMES

if TYPE_CHECKING:
    from crosscode.synthetic.runs import SyntheticResult

TEXT = f"""which scheme recovers what of a planted dictionary
Train crosscoders on activations from a planted dictionary and report what each scheme recovers.
SCHEME is one or several of {", ".join(SCHEMES)}; default: all.
Matched cosine: features and latents paired one to one (Hungarian). Precision and recall: of the features that only one
model has, by a latent's share of decoder norm. About 10 s a scheme."""


class Options(ConfigModel):
    schemes: list[str] = Field(default=[], title="SCHEME")
    """schemes to train"""
    json_file: Path | None = Field(default=None, alias="json", title="FILE")
    """also write all figures to this file, as JSON"""


def run(options: Options, fields: Callable[[type[BaseModel]], dict[str, Any]]) -> None:
    schemes = {"schemes": options.schemes} if options.schemes else {}
    config = checked(SyntheticConfig, fields(SyntheticConfig) | schemes)
    file = options.json_file
    if file is not None:
        check_output(file, "--json")
    from crosscode.synthetic.runs import markdown_table, run_synthetic

    results: list[SyntheticResult] = []
    for result in run_synthetic(config, progress=True):
        results.append(result)
        is_last = len(results) == len(config.schemes)  # a pipe, a device or a link to one takes it once
        if file is not None and (is_last or (not file.is_symlink() and (file.is_file() or not file.exists()))):
            write_output(file, (json_text(as_json(config, results)) + "\n").encode())
    print(markdown_table(results))


def as_json(config: SyntheticConfig, results: list[SyntheticResult]) -> dict[str, Any]:
    """Everything that decides the figures, and the figures."""
    return {"config": config.model_dump(mode="json"), "schemes": [result.to_json() for result in results]}


COMMAND = Command(TEXT, run, Options, positional="schemes", outline=SyntheticConfig)
