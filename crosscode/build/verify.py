"""Whether what lies in a run, a sweep, a saved model or a store is what was written: every byte, and what belongs together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from crosscode.build.arrays import HELDOUT_FILE
from crosscode.build.finished import check_is_its_own
from crosscode.build.schema import load_config
from crosscode.checksums import CHECKSUMS_FILE
from crosscode.data.arrays.heldout_file import read_header
from crosscode.data.rollouts import RolloutFolder
from crosscode.data.store.place import Place, RemotePath
from crosscode.data.store.positions import positions, read_position
from crosscode.data.store.reader import ActivationCache
from crosscode.errors import InputError, first_line
from crosscode.models.base import BaseCrosscoder
from crosscode.runs.checkpoints import find_step_damage
from crosscode.runs.directory import FIGURES, RunDirectory, open_run
from crosscode.runs.loggers import count_lines
from crosscode.runs.run_files import ASIDE, read_marker
from crosscode.stored import SweepRow, read_json
from crosscode.trainers.progress import Progress
from crosscode.weight_files import has_weights

Finding = tuple[str, str | None]
"""What was looked at, and what is wrong with it."""


def verify(path: Place) -> Iterator[Finding]:
    """One finding after the other; nothing is written.

    Raises:
        InputError: nothing of ours lies there.
    """
    if isinstance(path, RemotePath):
        yield from _store(path)
    elif any(path.glob("rollouts-*.jsonl")):
        yield _found("rollouts", lambda: bool(RolloutFolder(path, {}).whole()))
    elif (path / "manifest.json").exists():
        yield from _store(path)
    elif (path / "sweep.json").exists():
        yield from _sweep(path)
    elif has_weights(path):
        yield _found(".", partial(_model, path))
    elif (path / "config.yaml").exists() or (path / ASIDE).exists():
        yield from _run(path)
    else:
        raise InputError(f"verify: {str(path)!r} is no run, sweep, saved model, store or folder of rollouts")


def _found(name: str, look: Callable[[], object]) -> Finding:
    """`look` raises, or returns, what is wrong; whatever else it returns than a text is what it has read."""
    try:
        found = look()
    except (InputError, OSError) as error:
        return name, first_line(error)
    return name, found if isinstance(found, str) else None


def _run(path: Path) -> Iterator[Finding]:
    run = open_run(path)
    yield _found(
        ".crosscode", lambda: None if read_marker(path) else "missing: made by an earlier version, or taken away"
    )
    config = _found("config.yaml", partial(load_config, run.config_file))
    yield config
    read: dict[str, Any] = {}
    for name, kind in FIGURES.items():
        if (path / name).exists():
            yield _found(name, lambda name=name, kind=kind: read.update({name: read_json(path / name, kind)}))
    for name, n_lines in (("metrics.jsonl", read.get("summary.json", {}).get("n_metrics")), ("histograms.jsonl", None)):
        if (path / name).exists():
            yield _found(name, partial(_lines, path / name, n_lines or 0))
    if (path / HELDOUT_FILE).exists():
        yield _found(HELDOUT_FILE, partial(read_header, path / HELDOUT_FILE))
    for step in run.steps():
        yield _found(f"checkpoints/step_{step}", partial(find_step_damage, run.checkpoint(step)))
    if run.final.exists():
        yield _found("final", partial(_final, run, with_config=config[1] is None))
    elif (path / "summary.json").exists():
        yield "final", "missing: summary.json tells of it"


def _lines(file: Path, n_written: int) -> str | None:
    n_lines, n_bad = count_lines(file)
    if n_bad:
        return f"{n_bad} line(s) cannot be read"
    return f"{n_written - n_lines} line(s) are gone" if n_lines < n_written else None


def _final(run: RunDirectory, *, with_config: bool) -> str | None:
    problem = _model(run.final)
    run.check_figures()
    if problem is None and with_config:
        check_is_its_own(load_config(run.config_file), run.final)
    return problem


def _model(folder: Path) -> str | None:
    BaseCrosscoder.load(folder, backend="reference")
    return (
        None if (folder / CHECKSUMS_FILE).exists() else f"no {CHECKSUMS_FILE}: it loads, but nothing says what it was"
    )


def _sweep(path: Path) -> Iterator[Finding]:
    yield _found("sweep.json", partial(read_json, path / "sweep.json", list[SweepRow]))
    for folder in sorted(each.parent for each in path.glob("*/config.yaml")):
        for name, problem in _run(folder):
            yield f"{folder.name}/{name}", problem


def _store(path: Place) -> Iterator[Finding]:
    def rows() -> None:
        with closing(ActivationCache(path)) as store, Progress(store.n_rows, what="verify", unit="row") as shown:
            store.verify(lambda n_rows: shown.show(n_rows, ""))

    def position(file: Place, n_written: int) -> str | None:
        read_position(file)
        n_shards = len(list(path.glob("shard-*.safetensors")))
        return f"{n_written} shards were written, {n_shards} are there" if n_shards < n_written else None

    yield _found("rows", rows)
    for file, n_written in sorted(positions(path).items()):
        yield _found(file.name, partial(position, file, n_written))
