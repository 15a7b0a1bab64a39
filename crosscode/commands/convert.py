"""`crosscode convert`: a trained model with another activation."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from crosscode.commands.parts.command import Command, RunOptions
from crosscode.commands.parts.libraries import quiet_libraries

TEXT = """give a trained model thresholds in place of a selection
A TopK becomes a JumpReLU (or a BatchTopK) whose threshold lets through k latents a token on average, found on held-out text;
what has thresholds keeps them. DIR becomes a run; FVU and L0 before and after are printed."""


class Options(RunOptions):
    activation: str = "jumprelu"
    """jumprelu or batch_topk"""
    out: Path | None = Field(default=None, title="DIR")
    """a new run directory; null: RUN-jumprelu"""


def run(options: Options) -> None:
    quiet_libraries()
    from crosscode.build.converting import convert
    from crosscode.build.finished import FinishedRun
    from crosscode.interop.hub import is_repo

    run = FinishedRun(options.run_dir, options.trust_remote_code)
    near = Path(Path(options.run_dir).name) if is_repo(options.run_dir) else run.path
    out = options.out or near.with_name(f"{near.name}-{options.activation}")
    done = convert(run, options.activation, out)
    print(f"run         {done.path}")
    print(f"FVU         {done.before.fvu:.4f} -> {done.after.fvu:.4f}")
    for name, value in done.before.fvu_by_position.items():
        print(f"            {value:.4f} -> {done.after.fvu_by_position[name]:.4f}  {name}")
    print(f"L0          {done.before.l0:.2f} -> {done.after.l0:.2f}")


COMMAND = Command(TEXT, run, Options, positional="run_dir")
