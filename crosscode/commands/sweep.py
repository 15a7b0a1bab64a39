"""`crosscode sweep`: a grid of runs over one shared stream of activations."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from crosscode.commands.parts.command import Command, TrustOptions
from crosscode.commands.parts.libraries import quiet_libraries
from crosscode.commands.parts.options import experiment_values
from crosscode.commands.parts.sweep_grid import grid_points, parse_grid
from crosscode.errors import CrosscodeError, InputError


class Options(TrustOptions):
    config: str | None = Field(default=None, title="CONFIG.yaml")
    """config file or recipe that all runs start from"""
    grid: list[str] = Field(default=[], title="FIELD=VALUE,VALUE,...")
    """values of a field, such as train.optimizer.lr=1e-3,3e-4; given several times: all combinations"""
    run_dir: str | None = Field(default=None, title="DIR")
    """folder of all runs; null: the config's run_dir"""
    overwrite: bool = False
    """replace runs that are there, even if they are not over"""
    resume: str | None = Field(default=None, title="FOLDER")
    """go on with an interrupted sweep; nothing else is given"""


def run(options: Options) -> None:
    if options.resume is not None:
        if options != Options(resume=options.resume, trust_remote_code=options.trust_remote_code):
            raise InputError("sweep: usage: crosscode sweep --resume FOLDER (the configs are the runs' own)")
        folder = Path(options.resume)
        from crosscode.commands.parts.sweep_runs import resume_sweep

        quiet_libraries()
        results = resume_sweep(folder, trust_remote_code=options.trust_remote_code)
    else:
        if options.config is None:
            raise InputError("sweep: name a config file or a recipe, or --resume FOLDER")
        typed = {"run_dir": options.run_dir, "overwrite": options.overwrite or None}
        given = {name: value for name, value in typed.items() if value is not None}
        values = experiment_values(options.config, given, options.trust_remote_code)
        grid = parse_grid(options.grid)
        from crosscode.commands.parts.sweep_runs import run_sweep
        from crosscode.files import check_may_be_filled

        if options.run_dir is not None:
            check_may_be_filled(options.run_dir, "run_dir")
        quiet_libraries()
        points = grid_points(values, grid)
        folder = points[0].config.run_path().parent
        results = run_sweep(points, folder, typed_overwrite=options.overwrite)
    for result in results:
        if "error" in result:
            print(f"failed      {result['run']}: {result['error']}")
        else:
            figures = f"FVU {result['fvu']:.4f}  L0 {result['l0']:.1f}  dead {result['dead_fraction']:.3f}"
            print(f"{figures}  {result['run']}")
    print(f"runs        {folder}")
    if any("error" in result for result in results):
        raise CrosscodeError("some runs of the sweep failed")


COMMAND = Command("a grid of runs over one shared stream of activations", run, Options, positional="config")
