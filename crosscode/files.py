"""Files that are whole or not there; and what may be removed: by exact name, never through a link."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crosscode.errors import InputError

_PREFIX = ".crosscode-tmp-"
_TEMPORARY = re.compile(r"\.crosscode-tmp-.+-[a-z0-9_]{8}")


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, flush it to disk, and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path))
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def new_folder(path: Path, index: str) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    Where there is a folder at `path`, the new files take their places in it once all are complete, and whatever else
    lies there stays. `index` is the file without which the rest counts for nothing: it goes first and comes last.

    Raises:
        InputError: `path` is a link.
    """
    check_is_no_link(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path)))
    try:
        os.chmod(temporary, 0o755)
        yield temporary
        files = sorted(temporary.iterdir(), key=lambda file: file.name == index)
        for file in files:
            _sync(file)
        if path.exists():
            (path / index).unlink(missing_ok=True)
            for file in files:
                os.replace(file, path / file.name)
            temporary.rmdir()
        else:
            os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def temporary_file(path: Path) -> Path:
    """A name beside `path` to write under before it is renamed. The file is made, and was not there before."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path))
    os.close(handle)
    os.chmod(temporary, 0o644)
    return Path(temporary)


def is_temporary(path: Path) -> bool:
    """Whether a name is one that only the functions above give, to what is not complete yet."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove(path: Path) -> None:
    """A file, a link (never what it leads to), or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_is_no_link(path: Path) -> None:
    """Raise `InputError` for a link: what is written or removed through it would lie elsewhere."""
    if path.is_symlink():
        raise InputError(
            f"{str(path)!r} is a link (to {os.readlink(path)!r}), which is not followed; put what it names here"
        )


def check_may_be_filled(folder: str | Path, field: str) -> None:
    """Raise `InputError` for a folder that is nobody's to fill or clear: the working or the home folder, or above it.

    Args:
        field: what the user sets it with, for the message.
    """
    if not str(folder).strip():
        raise InputError(f"{field} = {str(folder)!r}: is empty; name a folder")
    real = Path(folder).expanduser().resolve()
    for what, taken in (("the working folder", Path.cwd()), ("the home folder", Path("~").expanduser())):
        taken = taken.resolve()
        if real == taken or real in taken.parents:
            which = what if real == taken else f"a folder that {what} is in"
            raise InputError(f"{field} = {str(folder)!r}: is {which}; name a new folder, such as 'runs/name'")


def _prefix(path: Path) -> str:
    return f"{_PREFIX}{path.name}-"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
