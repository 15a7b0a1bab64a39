"""`crosscode evaluate`: held-out figures of a trained run."""

from __future__ import annotations

import sys
from dataclasses import asdict

from pydantic import PositiveInt

from crosscode.commands.parts.command import Command, RunOptions
from crosscode.commands.parts.libraries import quiet_libraries
from crosscode.errors import InputError
from crosscode.files import json_text


class Options(RunOptions):
    n_tokens: PositiveInt | None = None
    """held-out activations; null: as in the run's config, and the figures are kept in the run"""
    closes: bool = False
    """also measure what a diff of two models explains: the share of KL(second || first) that goes away when the second
    model's latents are added to the first; random latents are measured beside them"""


def run(options: Options) -> None:
    from crosscode.build.finished import FinishedRun
    from crosscode.commands.parts.closing import check_closes, closes_of
    from crosscode.parallel.group import is_first, n_ranks

    quiet_libraries()
    if options.closes and n_ranks() > 1:
        raise InputError("closes: is measured in one process")
    run = FinishedRun(options.run_dir, options.trust_remote_code)
    if not run.is_over and is_first():
        print(f"crosscode: training is not over: these are figures of {run.model_folder}", file=sys.stderr)
    if options.closes:
        check_closes(run, 0, 1)
    result = run.evaluate(options.n_tokens, progress=True)
    shown = {name: value for name, value in result.to_json().items() if not name.endswith("_L")}
    if options.closes:
        shown["closes"] = asdict(closes_of(run))
        if options.n_tokens is None:
            run.keep(result.to_json() | {"closes": shown["closes"]})
    if is_first():
        print(json_text(shown))
    result.check_finite()


COMMAND = Command("held-out figures of a trained run", run, Options, positional="run_dir")
