"""The command line: `crosscode train | harvest | evaluate | report | demo | synthetic | backends | recipes`."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crosscode.errors import CrosscodeError, InputError, Interrupted

EXIT_BAD_INPUT = 2
EXIT_FAILED = 1
EXIT_INTERRUPTED = 75
EXIT_CTRL_C = 130
EXIT_CODES = f"""exit codes: 0 done; {EXIT_FAILED} failed; {EXIT_BAD_INPUT} bad input, nothing written;
{EXIT_INTERRUPTED} stopped by Ctrl-C or SIGTERM with everything saved, `crosscode train --resume RUN` goes on (a
second signal ends at once, by that signal; what is lost then is what came after the last checkpoint);
{EXIT_CTRL_C} stopped by Ctrl-C outside of training"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:
        return _guarded(lambda: _train(arguments[1:]))
    if arguments[:1] == ["harvest"]:
        return _guarded(lambda: _harvest(arguments[1:]))
    if arguments[:1] == ["synthetic"]:
        return _guarded(lambda: _synthetic(arguments[1:]))
    options = _parser().parse_args(arguments)
    return _guarded(lambda: options.run(options))


def _guarded(command: Any) -> int:
    """Run a command; errors a user can act on become one line."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    for ours in ("crosscode", "crosscode_kernels"):
        logging.getLogger(ours).setLevel(logging.INFO)
    try:
        command()
    except Interrupted as error:
        print(f"crosscode: {error}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        print("crosscode: stopped by Ctrl-C", file=sys.stderr)
        return EXIT_CTRL_C
    except InputError as error:
        print(f"crosscode: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except CrosscodeError as error:
        print(f"crosscode: {error}", file=sys.stderr)
        return EXIT_FAILED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"crosscode: {error}; free some space; a run goes on with: crosscode train --resume RUN", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="crosscode",
        description="Train crosscoders, transcoders and SAEs on language model activations.",
        epilog=EXIT_CODES,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    add("train", None, "train from a config file or recipe; `crosscode train --help` lists every field")
    add("harvest", None, "write activations to a store ahead of training; `crosscode harvest --help` lists every field")
    evaluate = add("evaluate", _evaluate, "held-out figures of a trained run")
    evaluate.add_argument("run_dir", metavar="RUN", help="run directory")
    evaluate.add_argument("--n-tokens", type=int, help="held-out activations (default: as in the run's config)")
    report = add("report", _report, "write RUN/report.html")
    report.add_argument("run_dir", metavar="RUN", help="run directory")
    report.add_argument("--n-tokens", type=int, help="held-out activations (default: as in the run's config)")
    report.add_argument("--csv", type=Path, metavar="FILE", help="also write the whole table of latents")
    demo = add("demo", _demo, "train, evaluate and report a crosscoder between two embedded language models")
    demo.add_argument("--run-dir", default="runs/demo", help="where to write (default: %(default)s)")
    demo.add_argument("--n-tokens", type=int, help="activations to train on (default: as in the recipe)")
    demo.add_argument(
        "--overwrite", action="store_true", help="replace any other run there, too, and one that is not over"
    )
    demo.add_argument("--backend", default="auto", help="auto, triton, torch or reference (default: %(default)s)")
    sweep = add("sweep", _sweep, "a grid of runs over one shared stream of activations")
    sweep.add_argument(
        "config", metavar="CONFIG.yaml", nargs="?", help="config file or recipe that all runs start from"
    )
    sweep.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="FIELD=VALUE,VALUE,...",
        help="values of a field, such as train.optimizer.lr=1e-3,3e-4; given several times: all combinations",
    )
    sweep.add_argument("--run-dir", help="folder of all runs (default: the config's run_dir)")
    sweep.add_argument(
        "--overwrite", action="store_true", help="replace runs that are there, even if they are not over"
    )
    sweep.add_argument("--resume", metavar="FOLDER", help="go on with an interrupted sweep, its folder alone given")
    add("synthetic", None, "which scheme recovers what of a planted dictionary; `crosscode synthetic --help`")
    doctor = add("doctor", _doctor, "versions, devices, a self-test of the kernels on this machine, disk speed")
    doctor.add_argument("--seconds", type=float, default=10.0, help="time for the self-test (default: %(default)s)")
    doctor.add_argument("--folder", default=".", help="where to measure the disk (default: here)")
    add("backends", _backends, "which kernels work here, and why not")
    add("recipes", _recipes, "training schemes that run as they stand: `crosscode train NAME`")
    return parser


# ---- commands; imports are local, so that --help and errors come at once


def _train(arguments: list[str]) -> None:
    if arguments[:1] == ["--resume"]:
        if len(arguments) != 2:
            raise InputError("train: usage: crosscode train --resume RUN (the config is the run's own, as it stands)")
        resume_training(Path(arguments[1]))
        return
    from crosscode.commands.overrides import config_from_arguments, with_bare_flag

    arguments, typed = with_bare_flag(arguments)
    run_training(config_from_arguments(arguments), typed_overwrite=typed)


def _quiet_libraries() -> None:
    """Keep the libraries' own bars for loading off the screen; ours say what takes time."""
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def run_training(config: Any, *, typed_overwrite: bool = False, made_by: str = "train") -> None:
    """Train, evaluate and write the summary of one experiment. What the options mean: `build_trainer`."""
    from crosscode.build.experiment import open_experiment
    from crosscode.build.replacing import check_may_begin
    from crosscode.build.run import build_trainer

    check_may_begin(config, typed_overwrite)
    _quiet_libraries()
    _run_to_the_end(build_trainer(open_experiment(config), typed_overwrite=typed_overwrite, made_by=made_by))


def resume_training(run_dir: Path) -> None:
    """Continue a run from its newest whole checkpoint."""
    from crosscode.build.experiment import open_experiment
    from crosscode.build.resume import ResumePoint
    from crosscode.build.run import build_trainer

    point = ResumePoint.find(run_dir)
    _quiet_libraries()
    _run_to_the_end(build_trainer(open_experiment(point.config), resume=point))


def _run_to_the_end(trainer: Any) -> None:
    from crosscode.commands.summary import print_figures

    trainer.train()
    print_figures(trainer.run.path, trainer.run.read_summary())


def _harvest(arguments: list[str]) -> None:
    from crosscode.commands.harvest import HARVEST, harvest_config, run_harvest
    from crosscode.commands.overrides import values_from_arguments

    try:
        options, rest = _harvest_options().parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise InputError(f"harvest: {error}") from error
    n_tokens = _positive("--n-tokens", options.n_tokens)
    store = [] if options.store is None else ["--data.cache.path", options.store]
    config = harvest_config(values_from_arguments([*rest, *store], HARVEST))
    _quiet_libraries()
    cache = run_harvest(config, n_tokens)
    M, P, D = cache.dims
    print(f"store       {cache.path}")
    print(f"activations {cache.n_rows} of {M} x {P} x {D}, {cache.layout.dtype}")
    print(f"size        {cache.n_bytes / 2**20:.1f} MiB in {len(cache.shards)} shards")
    for names, norms in zip(config.position_names(), cache.mean_norm_MP().tolist(), strict=True):
        for name, norm in zip(names, norms, strict=True):
            print(f"mean norm   {norm:.4g}  {name}")


def _harvest_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--store")
    parser.add_argument("--n-tokens", type=int)
    return parser


def _evaluate(options: argparse.Namespace) -> None:
    from crosscode.build.experiment import open_experiment
    from crosscode.build.schema import load_config
    from crosscode.runs.directory import open_run
    from crosscode.trainers.warm_start import find_model, load_folded

    n_tokens = _positive("--n-tokens", options.n_tokens)
    _quiet_libraries()
    run = open_run(options.run_dir)
    config = load_config(run.config_file)
    folder = find_model(str(run.path), "run")
    if folder != run.final:
        print(f"crosscode: training is not over: these are figures of {folder}", file=sys.stderr)
    experiment = open_experiment(config, to_train=False)
    model = load_folded(folder, config.backend, experiment.harvester.device)
    result = experiment.evaluate(model, n_tokens=n_tokens)
    run.write_evaluation(result.to_json())
    shown = {name: value for name, value in result.to_json().items() if name != "density_L"}
    print(json.dumps(shown, indent=2))


def _positive(option: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise InputError(f"{option} = {value}: must be at least 1")
    return value


def _report(options: argparse.Namespace) -> None:
    from crosscode.commands.report import report_run

    n_tokens = _positive("--n-tokens", options.n_tokens)
    _quiet_libraries()
    print(report_run(options.run_dir, n_tokens, options.csv))


def _demo(options: argparse.Namespace) -> None:
    from crosscode.build.replacing import is_the_same_experiment
    from crosscode.build.schema import check_config, read_yaml
    from crosscode.runs.directory import RunDirectory

    values = read_yaml("demo")
    values |= {"run_dir": options.run_dir, "backend": options.backend}
    if options.n_tokens is not None:
        values["train"]["n_tokens"] = options.n_tokens
    config = check_config(values)
    run = RunDirectory(config.run_path())
    own = is_the_same_experiment(run, config, "demo")
    print("language models: a base trained on Python sources, and its fine-tune on the Python manual", file=sys.stderr)
    if own and not (run.is_finished() or options.overwrite):
        print(f"a demo in {options.run_dir} was interrupted: it goes on", file=sys.stderr)
        resume_training(run.path)
    else:
        config = config.model_copy(update={"overwrite": own or options.overwrite})
        run_training(config, typed_overwrite=options.overwrite, made_by="demo")
    from crosscode.commands.report import report_run  # its plots are loaded once they are due

    print(f"report      {report_run(config.run_path())}")


def _sweep(options: argparse.Namespace) -> None:
    from crosscode.build.schema import read_yaml
    from crosscode.commands.sweep import resume_sweep, run_sweep
    from crosscode.commands.sweep_grid import grid_points, parse_grid
    from crosscode.files import check_may_be_filled

    _quiet_libraries()
    if options.resume is not None:
        if options.config is not None or options.grid or options.run_dir is not None:
            raise InputError("sweep: usage: crosscode sweep --resume FOLDER (the configs are the runs' own)")
        folder = Path(options.resume)
        results = resume_sweep(folder)
    else:
        if options.config is None:
            raise InputError("sweep: name a config file or a recipe, or --resume FOLDER")
        values = read_yaml(options.config)
        if options.run_dir is not None:
            check_may_be_filled(options.run_dir, "run_dir")
            values["run_dir"] = options.run_dir
        if options.overwrite:
            values["overwrite"] = True
        points = grid_points(values, parse_grid(options.grid))
        folder = points[0].config.run_path().parent
        results = run_sweep(points, folder, typed_overwrite=options.overwrite)
    for result in results:
        if "error" in result:
            print(f"failed      {result['run']}: {result['error']}")
        else:
            print(
                f"FVU {result['fvu']:.4f}  L0 {result['l0']:.1f}  dead {result['dead_fraction']:.3f}  {result['run']}"
            )
    print(f"runs        {folder}")
    if any("error" in result for result in results):
        raise CrosscodeError("some runs of the sweep failed")


def _synthetic(arguments: list[str]) -> None:
    from crosscode.commands.synthetic import run_command

    run_command(arguments)


def _doctor(options: argparse.Namespace) -> None:
    from crosscode.commands.doctor import examine

    if not Path(options.folder).is_dir():
        raise InputError(f"--folder = {options.folder!r}: no such folder")
    logging.getLogger("crosscode_kernels").setLevel(logging.WARNING)  # what it chose for toy sizes is of no interest
    print(f"tests of the kernels take about {options.seconds:.0f} s", file=sys.stderr)
    n_failed = 0
    for check in examine(Path(options.folder), options.seconds):
        print(check, flush=True)
        n_failed += check.ok is False
    if n_failed:
        raise CrosscodeError(f"{n_failed} check(s) failed")
    print("everything that was tested works")


def _backends(options: argparse.Namespace) -> None:
    from crosscode_kernels import available_backends

    for status in available_backends():
        print(f"{status.name:10} {'available' if status.available else 'not available'}  {status.reason}")


def _recipes(options: argparse.Namespace) -> None:
    from crosscode.recipes import recipe_names, recipe_path

    for name in recipe_names():
        path = recipe_path(name)
        first_line = path.read_text(encoding="utf-8").splitlines()[0] if path else ""
        print(f"{name:36} {first_line.removeprefix('# ')}")


if __name__ == "__main__":
    sys.exit(main())
