"""`crosscode verify`: whether the files of a run, a sweep, a saved model or a store are what was written."""

from __future__ import annotations

from contextlib import nullcontext

from pydantic import Field

from crosscode.commands.parts.command import Command
from crosscode.commands.parts.libraries import quiet_libraries
from crosscode.config.registry import ConfigModel
from crosscode.errors import CrosscodeError, InputError


class Options(ConfigModel):
    path: str = Field(title="RUN|STORE")
    """a run, a sweep, a saved model, or a store (a folder or a URL); or a repository USER/NAME"""


def run(options: Options) -> None:
    quiet_libraries()
    from crosscode.build.verify import verify
    from crosscode.data.store.place import is_url, place
    from crosscode.interop.hub import local
    from crosscode.trainers.progress import at_work

    path = place(options.path) if is_url(options.path) else local(options.path)
    if not is_url(options.path) and not path.is_dir():
        raise InputError(f"verify: {str(options.path)!r}: no such folder")
    n_all = n_bad = 0
    with at_work("verify") if not (path / "manifest.json").exists() else nullcontext():
        for name, problem in verify(path):
            print(
                f"{'whole' if problem is None else 'damaged':8}{name}{'' if problem is None else f': {problem}'}",
                flush=True,
            )
            n_all, n_bad = n_all + 1, n_bad + (problem is not None)
    if n_bad:
        raise CrosscodeError(f"verify: {n_bad} of {n_all} parts of {str(options.path)!r} are not as they were written")


COMMAND = Command("check every byte of a run or store against its checksums", run, Options, positional="path")
