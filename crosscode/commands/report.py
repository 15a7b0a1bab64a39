"""`crosscode report`: the pages about a run, on the held-out text that its config names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, PositiveInt

from crosscode.commands.parts.command import Command, RunOptions
from crosscode.commands.parts.libraries import quiet_libraries
from crosscode.errors import InputError
from crosscode.files import check_output

if TYPE_CHECKING:
    from crosscode.build.finished import FinishedRun


STEERED = 2.0
"""How much of a latent is added to show its effect, in multiples of its largest activation."""


class Options(RunOptions):
    run_dir: str = Field(title="RUN")
    """run directory, USER/NAME on the hub, or a sweep, whose page compares its runs"""
    n_tokens: PositiveInt | None = None
    """held-out activations; null: as in the run's config"""
    csv: Path | None = Field(default=None, title="FILE")
    """also write the table of all latents, with a plain header"""
    parquet: Path | None = Field(default=None, title="FILE")
    """also write that table as parquet"""
    features: Path | None = Field(default=None, title="DIR")
    """also write circuit-tracer's feature files into this new folder, from the same pass over the text"""
    steer_prompt: str | None = Field(default=None, title="TEXT")
    """with two models: also show how the second goes on after this text when the latents ranked first for it are added"""
    own_text: PositiveInt | None = Field(default=None, title="N")
    """also let each language model write about N tokens, going on from beginnings of the held-out text, and say how often
    latents fire on them"""


def run(options: Options) -> None:
    quiet_libraries()
    from crosscode.commands.parts.sweep_report import is_sweep, report_sweep

    if is_sweep(options.run_dir):
        for name in ("n_tokens", "csv", "parquet", "features", "steer_prompt", "own_text"):
            if getattr(options, name) is not None:
                raise InputError(f"{name}: is for one run, and {options.run_dir!r} holds a sweep; name one of its runs")
        print(report_sweep(Path(options.run_dir)))
        return
    given = (options.n_tokens, options.csv, options.trust_remote_code, options.parquet, options.features)
    print(report_run(options.run_dir, *given, steer_prompt=options.steer_prompt, n_own_tokens=options.own_text))


def report_run(
    run_dir: str | Path | FinishedRun,
    n_tokens: int | None = None,
    latents_csv: Path | None = None,
    trust_remote_code: bool = False,
    latents_parquet: Path | None = None,
    features: Path | None = None,
    *,
    steer_prompt: str | None = None,
    say: Callable[[str], None] = lambda _: None,
    n_own_tokens: int | None = None,
) -> Path:
    """Write `report.html` and `report/index.html` of a run; returns the path of the first.

    Args:
        n_tokens: held-out tokens to look at; default: as configured.
        latents_csv, latents_parquet: also write the table of all latents there.
        trust_remote_code: as of `load_own_config`.
        features: also write circuit-tracer's feature files there, a new folder.
        steer_prompt: text after which the second model's first latents are added to it, to say how it goes on then.
        say: is told what was found, a line at a time.
        n_own_tokens: tokens that each language model writes itself, to see how often latents fire on them; default: none.

    Raises:
        InputError: no run there, another process is at work in it, or no folder for a table.
    """
    from crosscode.analysis.report import HeldoutText, write_report
    from crosscode.build.finished import FinishedRun
    from crosscode.build.own_text import own_texts
    from crosscode.commands.parts.feature_files import check_out, circuit_tracer_writer
    from crosscode.commands.parts.reading import displays_of, tokenizers_of, unembeds_of
    from crosscode.trainers.progress import Progress

    for name, path in (("csv", latents_csv), ("parquet", latents_parquet)):
        if path is not None:
            check_output(path, name)
    run = run_dir if isinstance(run_dir, FinishedRun) else FinishedRun(run_dir, trust_remote_code)
    _ = run.config  # a bad one, or one that asks for trust, is said before anything is loaded
    run.check_whole()

    def heldout() -> HeldoutText:
        experiment = run.experiment
        batches = shown.through(experiment.heldout_batches(n_tokens))
        names = experiment.output_names()
        unembeds, groupings = unembeds_of(experiment), experiment.groupings()
        steered = None if steer_prompt is None else partial(_steered, run, steer_prompt)
        own = {} if n_own_tokens is None else own_texts(experiment, n_own_tokens)
        shows = unembeds, displays_of(experiment)
        about = (groupings, steered, own, tokenizers_of(experiment))
        return HeldoutText(batches, experiment.tokenizer, experiment.split, names, *shows, *about)

    also = None
    if features is not None:
        check_out(features, "features")
        also = circuit_tracer_writer(run, features)
    n_shown = n_tokens or run.config.evaluation.n_tokens
    with run.directory.held(), Progress(n_shown, what="report", unit="token") as shown:
        return write_report(
            run.path,
            heldout=heldout,
            latents_csv=latents_csv,
            latents_parquet=latents_parquet,
            also=also,
            say=say,
            is_checked=run.directory.has_final(),
        )


def _steered(run: FinishedRun, prompt: str, latent: int, model: str) -> str:
    """Which next token of a model becomes likelier when a latent is added, beside a random vector as long."""
    from crosscode.analysis.wording import percent_text
    from crosscode.commands.parts.steering import compare_steered

    ((name, found),) = compare_steered(run, prompt, {latent: STEERED}, models=[model], n_tokens=1).items()
    effect, random = (
        f"“{token}” from {percent_text(before)} to {percent_text(after)}"
        for token, before, after in (
            max(one.tokens, key=lambda change: change[2] - change[1]) for one in (found.changed, found.random)
        )
    )
    after = " ".join(prompt.split())
    return (
        f"Added to {name} after “{after}”, it takes {effect}; the most that a random vector as long does is {random}."
    )


COMMAND = Command("write RUN/report.html and an explorer of all latents", run, Options, positional="run_dir")
