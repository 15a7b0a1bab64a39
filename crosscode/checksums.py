"""`checksums.json`: whether the files of a folder are those that were written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from crosscode.errors import InputError
from crosscode.files import write_json
from crosscode.stored import Checksums, read_json

CHECKSUMS_FILE = "checksums.json"


def write_checksums(folder: Path) -> None:
    """Size and SHA-256 of every other file of the folder."""
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != folder / CHECKSUMS_FILE
    }
    write_json(folder / CHECKSUMS_FILE, {"files": files})


def find_damage(folder: Path, needed: Iterable[str] = ()) -> str | None:
    """What is wrong with a folder that has checksums, or None. `needed`: files of which it must have checksums."""
    try:
        files = read_json(folder / CHECKSUMS_FILE, Checksums)["files"]
        for name in needed:
            if name not in files:
                return f"{CHECKSUMS_FILE} lacks {name}"
        for name, expected in files.items():
            file = folder / name
            if Path(name).name != name or not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
            if _sha256(file) != expected["sha256"]:
                return f"{name} has another checksum than when it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except InputError as error:
        return str(error)
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror or error})"
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
