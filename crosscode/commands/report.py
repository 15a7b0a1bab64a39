"""`crosscode report`: the page about a run, on the held-out text that its config names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, PositiveInt

from crosscode.commands.parts.command import Command
from crosscode.commands.parts.libraries import quiet_libraries
from crosscode.config.registry import ConfigModel

if TYPE_CHECKING:
    from crosscode.build.finished import FinishedRun


class Options(ConfigModel):
    run_dir: str = Field(title="RUN")
    """run directory"""
    n_tokens: PositiveInt | None = None
    """held-out activations; null: as in the run's config"""
    csv: Path | None = Field(default=None, title="FILE")
    """also write the whole table of latents"""
    trust_remote_code: bool = False
    """let the run's language models run code of their own, where its config says so"""


def run(options: Options) -> None:
    quiet_libraries()
    print(report_run(options.run_dir, options.n_tokens, options.csv, options.trust_remote_code))


def report_run(
    run_dir: str | Path | FinishedRun,
    n_tokens: int | None = None,
    latents_csv: Path | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write `report.html` of a run; returns its path.

    Args:
        n_tokens: held-out tokens to look at; default: as configured.
        latents_csv: also write the whole diffing table of the first pair of positions there.
        trust_remote_code: as of `load_own_config`.
    """
    from crosscode.analysis.report import HeldoutText, write_report
    from crosscode.build.finished import FinishedRun

    run = run_dir if isinstance(run_dir, FinishedRun) else FinishedRun(run_dir, trust_remote_code)
    _ = run.config  # a bad one, or one that asks for trust, is said before anything is loaded

    def heldout() -> HeldoutText:
        experiment = run.experiment
        batches = experiment.heldout_batches(n_tokens)
        return HeldoutText(batches, experiment.tokenizer, experiment.split, experiment.output_names())

    return write_report(run.path, heldout=heldout, latents_csv=latents_csv)


COMMAND = Command("write RUN/report.html", run, Options, positional="run_dir")
