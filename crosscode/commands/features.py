"""`crosscode features`: what every latent does, as the files of other tools."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from crosscode.commands.parts.command import Command, RunOptions
from crosscode.commands.parts.libraries import quiet_libraries


class Options(RunOptions):
    to: Literal["circuit-tracer", "delphi", "dataset"] = Field(title="FORMAT")
    """circuit-tracer, delphi, or dataset: a parquet file with a row for each latent"""
    out: Path = Field(title="DIR")
    """a new folder"""
    layer: NonNegativeInt | None = None
    """layer under which circuit-tracer finds the features; null: that of the run's first hookpoint"""
    n_tokens: PositiveInt | None = None
    """held-out activations; null: as in the run's config"""


def run(options: Options) -> None:
    from crosscode.build.finished import FinishedRun
    from crosscode.commands.parts.feature_files import check_out, write_features

    check_out(options.out, "out")
    quiet_libraries()
    run = FinishedRun(options.run_dir, options.trust_remote_code)
    try:
        print(write_features(run, options.to, options.out, options.layer, options.n_tokens))
    except BaseException:
        shutil.rmtree(options.out, ignore_errors=True)  # it was not there before
        raise


COMMAND = Command(
    "examples and logits of every latent, as files of circuit-tracer or delphi, or a data set",
    run,
    Options,
    positional="run_dir",
)
