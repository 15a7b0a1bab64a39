"""`crosscode report`: the pages about a run, on the held-out text that its config names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, PositiveInt

from crosscode.commands.parts.command import Command
from crosscode.commands.parts.libraries import quiet_libraries
from crosscode.config.registry import ConfigModel
from crosscode.errors import InputError

if TYPE_CHECKING:
    from crosscode.build.finished import FinishedRun


class Options(ConfigModel):
    run_dir: str = Field(title="RUN")
    """run directory"""
    n_tokens: PositiveInt | None = None
    """held-out activations; null: as in the run's config"""
    csv: Path | None = Field(default=None, title="FILE")
    """also write the table of all latents, with a plain header"""
    parquet: Path | None = Field(default=None, title="FILE")
    """also write that table as parquet"""
    features: Path | None = Field(default=None, title="DIR")
    """also write circuit-tracer's feature files into this new folder, from the same pass over the text"""
    trust_remote_code: bool = False
    """let the run's language models run code of their own, where its config says so"""


def run(options: Options) -> None:
    quiet_libraries()
    print(
        report_run(
            options.run_dir,
            options.n_tokens,
            options.csv,
            options.trust_remote_code,
            options.parquet,
            options.features,
        )
    )


def report_run(
    run_dir: str | Path | FinishedRun,
    n_tokens: int | None = None,
    latents_csv: Path | None = None,
    trust_remote_code: bool = False,
    latents_parquet: Path | None = None,
    features: Path | None = None,
) -> Path:
    """Write `report.html` and `report/index.html` of a run; returns the path of the first.

    Args:
        n_tokens: held-out tokens to look at; default: as configured.
        latents_csv, latents_parquet: also write the table of all latents there.
        trust_remote_code: as of `load_own_config`.
        features: also write circuit-tracer's feature files there, a new folder.

    Raises:
        InputError: no run there, another process is at work in it, or no folder for a table.
    """
    from crosscode.analysis.report import HeldoutText, write_report
    from crosscode.build.finished import FinishedRun
    from crosscode.commands.parts.feature_files import check_out, circuit_tracer_writer
    from crosscode.commands.parts.reading import unembed_of
    from crosscode.trainers.progress import Progress

    for name, path in (("csv", latents_csv), ("parquet", latents_parquet)):
        if path is not None and not path.parent.is_dir():
            raise InputError(f"{name}: {str(path)!r}: its folder does not exist")
    run = run_dir if isinstance(run_dir, FinishedRun) else FinishedRun(run_dir, trust_remote_code)
    _ = run.config  # a bad one, or one that asks for trust, is said before anything is loaded

    def heldout() -> HeldoutText:
        experiment = run.experiment
        batches = shown.through(experiment.heldout_batches(n_tokens))
        names = experiment.output_names()
        unembed, groupings = unembed_of(experiment), experiment.groupings()
        return HeldoutText(batches, experiment.tokenizer, experiment.split, names, unembed, groupings)

    also = None
    if features is not None:
        check_out(features, "features")
        also = circuit_tracer_writer(run, features)
    n_shown = n_tokens or run.config.evaluation.n_tokens
    with run.directory.held(), Progress(n_shown, what="report", unit="token") as shown:
        return write_report(
            run.path, heldout=heldout, latents_csv=latents_csv, latents_parquet=latents_parquet, also=also
        )


COMMAND = Command("write RUN/report.html and an explorer of all latents", run, Options, positional="run_dir")
