"""What crosscode writes in a run directory, by exact name: all that a replaced run loses. Everything else stays.

How a run is replaced: its files move into `.crosscode-old/` inside the directory, `config.yaml` first, and are removed
once the new run has its first checkpoint. Before the new run's `config.yaml` is written, `restore` puts everything
back; so that wherever a process ends, the directory holds the old run, or the new one with the old one put by.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosscode.errors import InputError
from crosscode.files import check_is_no_link, check_is_plain, is_temporary, remove, write_json
from crosscode.formats import RUN, STATE_TENSORS
from crosscode.stored import Marker, read_json
from crosscode.weight_files import WEIGHTS

MARKER, ASIDE, LOCK_FILE, CONFIG_FILE = ".crosscode", ".crosscode-old", "lock", "config.yaml"
_TOP = (
    CONFIG_FILE,
    MARKER,
    "metrics.jsonl",
    "histograms.jsonl",
    "summary.json",
    "evaluation.json",
    "wandb.json",
    "report.html",
    "heldout.safetensors",
)
_EXPLORER = ("index.html", "tabulator.min.js", "tabulator.LICENSE", "notes.json")


def _any(names: tuple[str, ...]) -> str:
    return "|".join(re.escape(name) for name in names)


_MODEL = f"{_any(('config.json', 'checksums.json'))}|{WEIGHTS}"
_STEP = f"{_MODEL}|{_any(('trainer_state.json', STATE_TENSORS))}"


# Folders, and what is ours in each. wandb links to its newest run and its logs, all within its own folder.
_FOLDERS = {
    r"\.": _any(_TOP),
    r"final": _MODEL,
    r"checkpoints": r"(?!)",
    r"checkpoints/(damaged_)?step_\d+": _STEP,
    r"report": _any(_EXPLORER),
    r"report/data": r"(table|texts|records-\d+)\.js",
    r"tokenizer": r".+\.(json|jinja|txt|model)",
    r"tensorboard": r"events\.out\.tfevents\..+",
    r"wandb": r"(offline-)?run-.+|latest-run|debug(-internal)?\.log",
}


@dataclass
class Found:
    """Paths below a run directory: files of ours (`config.yaml` and the marker first), what else lies among them, and
    our folders, inner ones first."""

    ours: list[Path] = field(default_factory=list)
    foreign: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)


def find_files(root: Path) -> Found:
    """What lies in a run directory. Folders that are not ours are not looked into.

    Raises:
        InputError: there is a link. Nothing is written, moved or removed through one.
    """
    found = Found()

    def walk(folder: Path, names: str) -> None:
        for path in sorted(folder.iterdir()):
            relative = path.relative_to(root)
            ours = re.fullmatch(names, path.name) is not None
            if folder != root / "wandb" or not ours:
                check_is_plain(path) if ours else check_is_no_link(path)
            inner = _names_in(relative) if path.is_dir() else None
            if inner is not None:
                walk(path, inner)
                found.folders.append(relative)
            elif ours or is_temporary(path):
                found.ours.append(relative)
            elif folder == root and path.name == LOCK_FILE:
                check_is_plain(path)
            elif folder != root or path.name != ASIDE:
                found.foreign.append(relative)

    if root.is_dir():
        walk(root, _FOLDERS[r"\."])
    found.ours.sort(key=lambda path: (path != Path(CONFIG_FILE), path != Path(MARKER)))
    return found


def _names_in(folder: Path) -> str | None:
    return next((names for pattern, names in _FOLDERS.items() if re.fullmatch(pattern, folder.as_posix())), None)


def is_ours(file: Path) -> bool:
    """Whether crosscode writes a file of that name, which is relative to the run directory."""
    names = _names_in(file.parent)
    return names is not None and re.fullmatch(names, file.name) is not None


def remove_files(root: Path) -> None:
    """Remove what is ours, `config.yaml` last: until then it is the run that it was."""
    found = find_files(root)
    for path in reversed(found.ours):
        remove(root / path)
    _remove_empty(root, found.folders)


def move_files(source: Path, target: Path, *, config_first: bool) -> None:
    """Move what is ours, one file after the other, over what is there. What else lies in `source` stays."""
    found = find_files(source)
    for path in found.ours if config_first else reversed(found.ours):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        if (target / path).is_dir():
            remove(target / path)  # a run of wandb, the one kind of folder that is moved whole
        os.rename(source / path, target / path)
    _remove_empty(source, found.folders)


def _remove_empty(root: Path, folders: list[Path]) -> None:
    for folder in folders:
        if not any((root / folder).iterdir()):
            (root / folder).rmdir()


def step_files(folder: Path) -> Iterator[Path]:
    """The files of ours in the folder of one checkpoint."""
    return (path for path in sorted(folder.iterdir()) if re.fullmatch(_STEP, path.name) or is_temporary(path))


# ---- the marker


def write_marker(root: Path, kind: str, **facts: Any) -> None:
    """`.crosscode`: which kind of folder this is, and what crosscode writes in it."""
    writes = [*_TOP, LOCK_FILE, ASIDE, "checkpoints", "final", "report", "tensorboard", "tokenizer", "wandb"]
    names = {"run": writes, "sweep": [MARKER, LOCK_FILE, "sweep.json"]}[kind]
    write_json(root / MARKER, {"kind": kind, **RUN.stamp(), **facts, "writes": names})


def read_marker(root: Path) -> dict[str, Any] | None:
    """The marker of a folder, or None.

    Raises:
        InputError: it is a link, or not as crosscode writes it.
    """
    path = root / MARKER
    check_is_no_link(path)
    if not path.is_file():
        return None
    marker = read_json(path, Marker)
    if marker["kind"] not in ("run", "sweep"):
        raise InputError(f"{path}: kind = {marker['kind']!r}: unknown to this version of crosscode")
    return RUN.read(marker, str(path))


# ---- replacing


def move_aside(root: Path) -> None:
    """Put a run by. A run that was put by before, and never followed by one with a checkpoint, stays in its stead."""
    aside = root / ASIDE
    if (aside / CONFIG_FILE).is_file() and not _is_worth_keeping(root):
        remove_files(root)
        return
    drop_aside(root)
    aside.mkdir(exist_ok=True)
    move_files(root, aside, config_first=True)


def _is_worth_keeping(root: Path) -> bool:
    whole = (r"checkpoints/step_\d+/checksums\.json", r"final/config\.json")
    return any(re.fullmatch(name, path.as_posix()) for path in find_files(root).ours for name in whole)


def is_half_replaced(root: Path) -> bool:
    """Whether a process ended between the first file put by and the new run's `config.yaml`."""
    check_is_no_link(root / ASIDE)
    return (root / ASIDE / CONFIG_FILE).is_file() and not (root / CONFIG_FILE).exists()


def restore(root: Path) -> None:
    """Put back what was put by."""
    move_files(root / ASIDE, root, config_first=False)
    _remove_aside(root)


def drop_aside(root: Path) -> None:
    """Remove what was put by."""
    aside = root / ASIDE
    check_is_no_link(aside)
    if aside.is_dir():
        (aside / CONFIG_FILE).unlink(missing_ok=True)
        remove_files(aside)
        _remove_aside(root)


def _remove_aside(root: Path) -> None:
    if not any((root / ASIDE).iterdir()):
        (root / ASIDE).rmdir()
