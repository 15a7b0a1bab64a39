"""Where a store lies: a local folder (`pathlib.Path`), or a folder of any fsspec file system with as much of the same interface
as stores use.

N runs of consecutive rows · R rows · E bytes of a row.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from crosscode.errors import InputError, first_line
from crosscode.files import write_parts

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*://")
_LOCAL = re.compile(r"(?:file|local)://")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_PATIENCE = {protocol: {"requests_timeout": 60} for protocol in ("gs", "gcs")}
"""Options of those that would wait for ever, in seconds."""
_TRIES = 4
_FIRST_PAUSE = 0.1
"""Seconds; each next one is four times as long. What a file system tries again by itself comes on top."""
_REQUESTS = 256
"""On their way at once."""
_LARGEST = 512 << 10
_GAP = 64 << 10
"""Bytes between two runs that cost less than another request."""


def is_url(path: object) -> bool:
    """Whether it names no local folder."""
    return bool(_URL.match(str(path))) and not _LOCAL.match(str(path))


def place(path: str | Path | RemotePath) -> Place:
    """What `path` names: a folder, or a URL such as s3://bucket/store.

    Raises:
        InputError: a file system that is not known, or whose package is missing.
    """
    if isinstance(path, RemotePath):
        return path
    text = str(path)
    if not is_url(text):
        return Path(_LOCAL.sub("", text) if isinstance(path, str) else path)
    if re.match(r"[^/]*//[^/]*:[^/]*@", text):
        raise InputError(f"store {text.partition('@')[2]!r}: has a password in its name, which runs would record")
    import fsspec

    protocol = text.partition("://")[0]
    try:
        files, inner = fsspec.core.url_to_fs(text, **_PATIENCE.get(protocol, {}))
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        advice = f"pip install 'crosscode[{extra}]'" if extra else first_line(error)
        raise InputError(f"store {text!r}: the package for {protocol}:// is not installed; {advice}") from error
    except Exception as error:
        raise InputError(f"store {text!r}: {first_line(error)}") from error
    if not inner.strip("/"):
        raise InputError(f"store {text!r}: names no folder; write {protocol}://BUCKET/STORE")
    return RemotePath(text.rstrip("/"), files, inner.rstrip("/"))


def absolute(path: str) -> str:
    """The same place from any working folder."""
    found = place(path) if not is_url(path) else path
    return found if isinstance(found, str) else str(Path(str(found)).expanduser().resolve())


class RemotePath:
    """A place on a file system `files` of fsspec. What fails is tried again a few times, and then is an OSError of one line;
    what is not there, or there already, is said at once. `size`: of an object, where a listing said so."""

    def __init__(self, url: str, files: Any, inner: str, size: int | None = None):
        self.url, self.files, self.inner, self.size = url, files, inner, size
        self.name = url.rpartition("/")[2]

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}", self.files, f"{self.inner}/{name}")

    def __str__(self) -> str:
        return self.url

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __lt__(self, other: RemotePath) -> bool:
        return self.url < other.url

    @property
    def has_folders(self) -> bool:
        """Which must be made; no object store does."""
        return not self.files.async_impl

    def exists(self) -> bool:
        return self._info() is not None

    def is_file(self) -> bool:
        return self.size is not None or (self._info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        return self.size is None and (self._info() or {}).get("type") == "directory"

    def is_symlink(self) -> bool:
        return False

    def iterdir(self) -> Iterator[RemotePath]:
        """None where there is no such folder."""
        try:
            found = self._tried(self._listed)
        except FileNotFoundError:
            return
        for each in found:
            name = each["name"].rstrip("/").rpartition("/")[2]
            if name and each["name"].strip("/") != self.inner.strip("/"):  # some list the folder itself
                size = each["size"] if each["type"] == "file" else None
                yield RemotePath(f"{self.url}/{name}", self.files, f"{self.inner}/{name}", size)

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        return (each for each in self.iterdir() if fnmatch.fnmatchcase(each.name, pattern))

    def stat(self) -> Any:
        size = self.size if self.size is not None else (self._info() or {}).get("size")
        if size is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.url)
        return SimpleNamespace(st_size=size)

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Object stores have no folders, and to make one there may make a bucket."""
        if self.has_folders:
            self._tried(self.files.makedirs, self.inner, exist_ok=True)

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._tried(self.files.rm_file, self.inner)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def read_bytes(self) -> bytes:
        """The whole object; an answer that was cut is asked for again."""

        def get() -> bytes:
            content = self.files.cat_file(self.inner)
            if (size := self._size_now()) != len(content):
                raise OSError(errno.EIO, f"{len(content)} of {size} bytes came")
            return content

        return self._tried(get)

    def read_range(self, start: int, end: int) -> bytes:
        """Fewer bytes where the object ends before; of one whose size is known, an answer that was cut is asked for again."""

        def get() -> bytes:
            last = end if self.size is None else min(end, self.size)
            content = self.files.cat_file(self.inner, start=start, end=last) if start < last else b""
            if self.size is not None and len(content) < last - start:
                raise OSError(errno.EIO, f"{len(content)} of {last - start} bytes came")
            return content

        return self._tried(get)

    def write(self, content: bytes, *, new: bool = False) -> None:
        """The object, whole or not there, as far as the file system has it so. `new`: FileExistsError where there is one, which
        S3, GCS and memory decide in one step with the writing; others have looked just before."""
        tried = False
        taken = FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self.url)

        def put() -> None:
            nonlocal tried
            again, tried, mode = tried, True, {"mode": "create"} if new else {}
            if new and self._size_now() is not None:
                # An attempt may have succeeded, or been cut, without our hearing of it.
                if not again or not content.startswith(self.files.cat_file(self.inner)):
                    raise taken
                mode = {}
            try:
                self.files.pipe_file(self.inner, content, **mode)
            except FileExistsError as error:
                raise taken from error
            except FileNotFoundError as error:
                missing = error.strerror or "there is no such bucket or folder"
                raise FileNotFoundError(errno.ENOENT, missing, self.url) from error
            if (size := self._size_now()) != len(content):
                raise OSError(errno.EIO, f"{size} of {len(content)} bytes were written")

        self._tried(put)
        self.size = len(content)

    def _info(self) -> dict[str, Any] | None:
        return self._tried(self._info_now)

    def _info_now(self) -> dict[str, Any] | None:
        """None where there is nothing; `exists` of fsspec says so of whatever does not answer, too."""
        self.files.invalidate_cache()
        try:
            return self.files.info(self.inner)
        except FileNotFoundError:
            return None

    def _size_now(self) -> int | None:
        return found["size"] if (found := self._info_now()) else None

    def _listed(self) -> list[dict[str, Any]]:
        self.files.invalidate_cache()
        return self.files.ls(self.inner, detail=True)

    def _tried(self, action: Callable[..., Any], *args: Any, **options: Any) -> Any:
        n_tried = 0
        while True:
            n_tried += 1
            try:
                return action(*args, **options)
            except (FileNotFoundError, FileExistsError):
                raise
            except Exception as error:  # of any library below fsspec
                is_final = isinstance(error, (PermissionError, NotImplementedError))
                if is_final or n_tried >= _TRIES:
                    said = getattr(error, "strerror", None) or first_line(error)
                    code = errno.EACCES if is_final else errno.EIO
                    raise OSError(code, f"{said} (tried {n_tried} times)", self.url) from error
            time.sleep(_FIRST_PAUSE * 4 ** min(n_tried - 1, 3))


Place = Path | RemotePath


def write_whole(path: Place, parts: Iterable[Any], *, new: bool = False) -> None:
    """A file that is whole or not there. `new`: remotely, none that is there is written over."""
    if isinstance(path, Path):
        write_parts(path, parts)
    else:
        path.write(b"".join(memoryview(part).cast("B") for part in parts if len(part)), new=new)


def read_range(path: Place, start: int, end: int) -> bytes:
    if isinstance(path, RemotePath):
        return path.read_range(start, end)
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(end - start)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_REQUESTS, thread_name_prefix="crosscode-store")


def for_each(action: Callable[[Any], Any], of: Iterable[Any], path: Place) -> list[Any]:
    """In their order; at once where that hides how long each answer takes."""
    return list(_pool().map(action, of) if isinstance(path, RemotePath) else map(action, of))


def read_remote_runs(
    places_N: list[RemotePath], at_N: np.ndarray, first_N: np.ndarray, out_RE: np.ndarray
) -> Iterator[bool]:
    """As `read_runs`, but all is on its way at the return and there when the iterator ends. Neighbours are asked for together and
    long runs in parts, `_REQUESTS` of at most `_LARGEST` bytes at once; each holds its own bytes until they are in place."""
    out = memoryview(out_RE.reshape(-1))  # pyright: ignore[reportArgumentType]
    edges = [*(first_N * out_RE.shape[1]).tolist(), out_RE.size]
    requests: list[tuple[RemotePath, list[tuple[int, int, int]]]] = []  # (from, to, place in `out`) of each
    for i, (where, at) in enumerate(zip(places_N, at_N.tolist(), strict=True)):
        for begin in range(edges[i], edges[i + 1], _LARGEST):
            start = at + begin - edges[i]
            piece = (start, start + min(_LARGEST, edges[i + 1] - begin), begin)
            last = requests[-1] if requests else None
            if (
                last
                and last[0] is where
                and 0 <= start - last[1][-1][1] <= _GAP
                and piece[1] - last[1][0][0] <= _LARGEST
            ):
                last[1].append(piece)
            else:
                requests.append((where, [piece]))

    def get(request: tuple[RemotePath, list[tuple[int, int, int]]]) -> bool:
        where, pieces = request
        first, end = pieces[0][0], pieces[-1][1]
        content = memoryview(where.read_range(first, end))
        for start, stop, begin in pieces if len(content) == end - first else ():
            out[begin : begin + stop - start] = content[start - first : stop - first]
        return len(content) == end - first

    return _pool().map(get, requests)
