"""`crosscode synthetic [SCHEME ...] [--field value ...]`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from crosscode.commands.overrides import Command, option_values
from crosscode.config.checked import checked
from crosscode.errors import InputError
from crosscode.synthetic.runs import SyntheticConfig, SyntheticResult, markdown_table, run_synthetic
from crosscode.synthetic.schemes import SCHEMES

HELP_HEAD = f"""Train crosscoders on activations from a planted dictionary and report what each scheme recovers.
SCHEME is one or several of {", ".join(SCHEMES)}; default: all.
Matched cosine: features and latents paired one to one (Hungarian). Precision and recall: of the features that only one
model has, by a latent's share of decoder norm. About 10 s a scheme."""


class Options(SyntheticConfig):
    """What the command line takes."""

    json_file: Path | None = Field(default=None, alias="json")
    """also write all figures to this file, as JSON"""


COMMAND = Command("synthetic", HELP_HEAD, lambda: Options, needs_file=False, positional="[SCHEME ...]")


def run_command(arguments: list[str]) -> None:
    """Train, print the table, and write the figures where `--json` says.

    Raises:
        InputError: before anything is trained.
    """
    n_schemes = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    schemes = {"schemes": arguments[:n_schemes]} if n_schemes else {}
    given = option_values(arguments[n_schemes:], COMMAND) | schemes
    values = checked(Options, given).model_dump()
    file: Path | None = values.pop("json_file")
    if file is not None and not file.resolve().parent.is_dir():
        raise InputError(f"--json = {str(file)!r}: no such folder: {str(file.resolve().parent)!r}")
    config = SyntheticConfig.model_validate(values)
    results: list[SyntheticResult] = []
    for result in run_synthetic(config, progress=True):
        results.append(result)
        if file is not None:
            file.write_text(json.dumps(as_json(config, results), indent=1) + "\n", encoding="utf-8")
    print(markdown_table(results))


def as_json(config: SyntheticConfig, results: list[SyntheticResult]) -> dict[str, Any]:
    """Everything that decides the figures, and the figures."""
    return {"config": config.model_dump(mode="json"), "schemes": [result.to_json() for result in results]}
