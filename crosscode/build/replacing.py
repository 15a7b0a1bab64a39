"""Whether a new run may begin in a folder: what lies there, and who may replace it."""

from __future__ import annotations

from pathlib import Path

from crosscode.build.resume import config_values
from crosscode.build.schema import load_config
from crosscode.config.experiment import ExperimentConfig
from crosscode.errors import InputError
from crosscode.files import check_can_be_made, check_may_be_filled, is_temporary
from crosscode.runs.directory import RunDirectory
from crosscode.runs.run_files import ASIDE, CONFIG_FILE, LOCK_FILE, MARKER, find_files, read_marker


def check_may_begin(config: ExperimentConfig, typed: bool = False, *, held: bool = False) -> None:
    """Raise `InputError` if what lies in a config's run directory may not be replaced. A run that was left half
    replaced is put back.

    A finished run is replaced where `overwrite` is set; one that is not over, or from before crosscode marked its
    folders, only where that was `typed` on the command line. What is no run is never replaced. `held`: by this process.
    """
    run = RunDirectory(config.run_path())
    path = run.path
    check_may_be_filled(config.run_dir.replace("{name}", config.name), "run_dir")
    if not held:
        check_can_be_made(path, "run_dir")
    if path.is_symlink():
        raise InputError(f"run_dir: {str(path)!r} is a link to {str(path.resolve())!r}; name that folder itself")
    if path.exists() and not path.is_dir():
        raise InputError(f"run_dir: {str(path)!r} is a file")
    if not path.is_dir():
        return
    find_files(path)  # refuses links, before anything is moved
    if not held:
        run.check_not_held()
    run.recover()
    ours, marker = find_files(path).ours, read_marker(path)
    if marker is not None and marker["kind"] != "run":
        raise InputError(f"run_dir: {str(path)!r} holds a {marker['kind']}; choose another name")
    if not run.config_file.is_file():
        _check_holds_no_run(path, ours, marked=marker is not None)
        return
    if marker is None and not _is_earlier_run(path, ours):
        raise InputError(f"run_dir: {str(path)!r} is not empty and holds no run; choose another name")
    if typed and config.overwrite:
        return
    how = f"go on with it by `crosscode train --resume {path}`, choose another name, or replace it by --overwrite"
    if marker is None:
        raise InputError(f"run_dir: {str(path)!r} holds a run that an earlier version made; {how} on the command line")
    if not run.is_finished():
        raise InputError(
            f"run_dir: {str(path)!r} holds a run that is not over (last checkpoint: {(run.steps() or ['none'])[-1]}); "
            f"{how} on the command line (overwrite: true in a file is not enough)"
        )
    if not config.overwrite:
        raise InputError(f"run_dir: {str(path)!r} holds a run; {how} (or overwrite: true in the config)")


def _check_holds_no_run(path: Path, ours: list[Path], marked: bool) -> None:
    """A new or empty folder, or one in which a run was about to be made. Beside the marker others' files may lie."""
    if marked and any(name != Path(MARKER) and not is_temporary(path / name) for name in ours):
        raise InputError(
            f"run_dir: {str(path)!r} holds a run without its {CONFIG_FILE}; put it back, or choose another name"
        )
    others = {entry.name for entry in path.iterdir() if not is_temporary(entry)} - {LOCK_FILE, MARKER, ASIDE}
    if others and not marked:
        raise InputError(f"run_dir: {str(path)!r} is not empty and holds no run; choose another name")


def _is_earlier_run(path: Path, ours: list[Path]) -> bool:
    """Whether a folder without the marker has all that a run has: a config of ours, and what a trainer writes."""
    if not any(name.parts[0] in ("metrics.jsonl", "checkpoints", "final") for name in ours):
        return False
    try:
        load_config(path / CONFIG_FILE)
    except InputError:
        return False
    return True


def is_the_same_experiment(run: RunDirectory, config: ExperimentConfig, made_by: str) -> bool:
    """Whether a run was made by this command, or from this config but for where and with which kernels it runs."""
    marker = read_marker(run.path) if run.path.is_dir() else None
    if marker is None or marker["kind"] != "run" or not run.config_file.is_file():
        return False
    if marker.get("made_by") == made_by:
        return True
    theirs, ours = (config_values(one) for one in (load_config(run.config_file), config))
    where = ("run_dir", "overwrite", "backend", "device")
    return {name: theirs[name] for name in theirs if name not in where} == {
        name: ours[name] for name in ours if name not in where
    }
