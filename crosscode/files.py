"""Files that are whole or not there; locks; and what may be removed: by exact name, never through a link."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from crosscode.errors import InputError

_PREFIX = ".crosscode-tmp-"
_VIEWS_PER_WRITE, _BYTES_HELD = 512, 32 << 20
_TEMPORARY = re.compile(r"\.crosscode-tmp-.+-[a-z0-9_]{8}")


def write_parts(path: Path, parts: Iterable[Any]) -> None:
    """A file that is whole or not there, whatever happens: written under a temporary name, flushed to disk, renamed.

    Args:
        parts: bytes or arrays, which follow one another in the file; taken as they are needed.

    Raises:
        InputError: `path` is a link.
        OSError: the system refuses; no partial file is left.
    """
    check_is_no_link(path)
    temporary = _temporary(path)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(handle, "wb", buffering=0):
            for views in _large_pieces(parts):
                _write_all(handle, views)
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _large_pieces(parts: Iterable[Any]) -> Iterator[list[memoryview]]:
    """Parts that may be made one after the other, never all in memory."""
    views, n_bytes = list[memoryview](), 0
    for part in parts:
        if len(part):
            views.append(memoryview(part).cast("B"))
            n_bytes += views[-1].nbytes
        if n_bytes >= _BYTES_HELD:
            yield views
            views, n_bytes = [], 0
    yield views


def _write_all(handle: int, views: list[memoryview]) -> None:
    """Few and large writes: the system then keeps the file in large pieces, which are read back much faster."""
    while views:
        n_written = os.writev(handle, views[:_VIEWS_PER_WRITE])
        while views and n_written >= len(views[0]):
            n_written -= len(views.pop(0))
        if views:
            views[0] = views[0][n_written:]


def write_text(path: Path, text: str) -> None:
    """As `write_parts`, in UTF-8; folders that are missing are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parts(path, [text.encode()])


def check_output(path: Path, field: str) -> None:
    """Raise `InputError` for a file that `write_output` could not write; nothing is written."""
    if not path.name or "\0" in str(path) or os.path.isdir(path):
        raise InputError(f"{field} = {str(path)!r}: names no file")
    if not os.path.isdir(path.parent):
        raise InputError(f"{field} = {str(path)!r}: no such folder: {str(path.parent)!r}")
    if not os.path.exists(path):
        check_can_be_made(path, field)
    elif not os.access(path.resolve().parent if path.is_file() else path, os.W_OK):
        raise InputError(f"{field} = {str(path)!r}: may not be written")


def write_output(path: Path, content: bytes) -> None:
    """What a user wants at a place of their own: a new file, whole or not at all. A pipe or a device, such as /dev/stdout,
    takes it and stays what it is; a link is followed.

    Raises:
        OSError: the system refuses; also where nobody reads a pipe.
    """
    for stream in filter(None, (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)):
        with suppress(OSError, ValueError):  # it is closed, or no file of the system's
            if os.path.samestat(path.stat(), os.fstat(stream.fileno())):
                stream.flush()  # a second place in the same file would be written over
                _write_all(stream.fileno(), [memoryview(content)])
                return
    if path.exists() and not path.is_file():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC), "wb", buffering=0) as stream:
            os.set_blocking(stream.fileno(), True)
            _write_all(stream.fileno(), [memoryview(content)])
    else:
        write_parts(path.resolve(), [content])


def json_text(value: Any, indent: int | None = 2) -> str:
    """JSON as its standard has it: a number that is not finite is null."""

    def strict(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, dict):
            return {key: strict(item) for key, item in value.items()}
        return [strict(item) for item in value] if isinstance(value, (list, tuple)) else value

    return json.dumps(strict(value), indent=indent, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json_text(value) + "\n")


@contextmanager
def new_folder(path: Path, index: str, replaces: str = "") -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    Where there is a folder at `path`, the new files take their places in it once all are complete, and whatever else
    lies there stays, but for names that match `replaces`. `index`, without which the rest counts for nothing, comes last.

    Raises:
        InputError: `path` is a link.
    """
    check_is_no_link(path)
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        files = sorted(temporary.iterdir(), key=lambda file: file.name == index)
        for file in files:
            _sync(file)
        if path.exists():
            (path / index).unlink(missing_ok=True)
            for old in path.iterdir() if replaces else ():
                if re.fullmatch(replaces, old.name) and not (temporary / old.name).exists():
                    remove(old)
            for file in files:
                os.replace(file, path / file.name)
            temporary.rmdir()
        else:
            os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # something else lies in it by now
            for parent in made:
                parent.rmdir()
        raise


@contextmanager
def held(path: Path, refusal: str, error: type[InputError] = InputError, *, patience: float = 0) -> Iterator[None]:
    """Within the block this process alone holds the lock file `path`, which is made and stays. The system lets go of it
    when the process ends, however it ends. Nothing is held on a file system without locks. `patience`: seconds to wait.

    Raises:
        InputError: or `error`: `refusal`, and the process that holds it; or `path` is a link.
    """
    check_is_no_link(path)
    lock = FileLock(path, thread_local=False)  # what one thread takes, another may give back
    holder = ""
    try:
        holder = path.read_text(errors="replace")[:40] if path.is_file() else ""
        lock.acquire(timeout=patience)
    except Timeout as taken:
        raise error(f"{refusal} ({holder})" if holder else refusal) from taken
    except NotImplementedError:
        pass
    except OSError as problem:
        if problem.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise error(f"{str(path.parent)!r} may not be written into ({problem.strerror}); take a copy") from problem
        if problem.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    try:
        if lock.is_locked:
            path.write_text(f"process {os.getpid()}")
        yield
    finally:
        lock.release()


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


def check_is_plain(path: Path) -> None:
    """Raise `InputError` for a link, and for what is there in place of a file: a folder, or a pipe, which would be waited for."""
    check_is_no_link(path)
    if path.exists() and not path.is_file():
        raise InputError(f"{str(path)!r} is no file, as crosscode would have it there; move it away")


def check_can_be_made(folder: Path, field: str) -> None:
    """Raise `InputError` for a folder that cannot be made, or be written into: it is tried, and nothing of that stays.

    What is no folder, or a link to one, is left to the caller.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if there == folder and (folder.is_symlink() or not folder.is_dir()):
        return
    trial = there / f"{_PREFIX}trial-00000000"
    try:
        if any(len(os.fsencode(part)) > os.pathconf("/", "PC_NAME_MAX") for part in folder.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        if there == folder:  # where a trial that is killed would stay
            if not os.access(folder, os.W_OK | os.X_OK):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            return
        with suppress(FileExistsError):  # of a process that was killed, or that tries the same
            trial.mkdir()
        with suppress(FileNotFoundError):  # that one took it away
            trial.rmdir()
    except OSError as error:
        raise InputError(
            f"{field} = {str(folder)[:200]!r}: cannot be made or written into: {error.strerror}"
        ) from error


def check_may_be_filled(folder: str | Path, field: str) -> None:
    """Raise `InputError` for a folder that is nobody's to fill or clear: the working or the home folder, or above it.

    Args:
        field: what the user sets it with, for the message.
    """
    if not str(folder).strip() or "\0" in str(folder):
        raise InputError(
            f"{field} = {str(folder)!r}: is {'no name' if str(folder).strip() else 'empty'}; name a folder"
        )
    real = Path(folder).expanduser().resolve()
    if len(os.fsencode(real)) >= os.pathconf("/", "PC_PATH_MAX"):
        raise InputError(f"{field} = {str(folder)[:200]!r}: is a longer path than the system takes")
    for what, taken in (("the working folder", Path.cwd()), ("the home folder", Path("~").expanduser())):
        taken = taken.resolve()
        if real == taken or real in taken.parents:
            which = what if real == taken else f"a folder that {what} is in"
            raise InputError(f"{field} = {str(folder)!r}: is {which}; name a new folder, such as 'runs/name'")


def _temporary(path: Path) -> Path:
    """A name beside `path` that nothing else has. What is made there gets the mode that the umask leaves."""
    return path.with_name(f"{_PREFIX}{path.name}-{secrets.token_hex(4)}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
