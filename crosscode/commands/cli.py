"""The command line: finds the file of a command in this folder, runs it, and turns its errors into lines and exit codes."""

from __future__ import annotations

import errno
import logging
import os
import pkgutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from crosscode.errors import CrosscodeError, InputError, Interrupted, RankLost
from crosscode.stopping import is_first, n_ranks

if TYPE_CHECKING:
    from crosscode.commands.parts.command import Command

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_RANK_LOST = 74
EXIT_INTERRUPTED = 75
EXIT_CTRL_C = 130
EXIT_CLOSED_PIPE = 141
DESCRIPTION = """Train crosscoders, transcoders and SAEs on language model activations.
`crosscode COMMAND --help` says more of each."""
EXIT_CODES = {
    0: "done",
    EXIT_FAILED: "failed",
    EXIT_BAD_INPUT: "bad input; nothing was written",
    EXIT_RANK_LOST: "another of the processes that train together has ended",
    EXIT_INTERRUPTED: "stopped by Ctrl-C or SIGTERM; everything is saved, and `crosscode train --resume RUN` goes on. A second "
    "signal ends at once and loses what came after the last checkpoint",
    EXIT_CTRL_C: "stopped by Ctrl-C outside of training (143: by SIGTERM, 129: by SIGHUP)",
    EXIT_CLOSED_PIPE: "nobody reads the output any more",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _guarded(lambda: _dispatch(arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # What is still buffered goes nowhere, or Python would complain of it when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CLOSED_PIPE


def command_names() -> list[str]:
    """Each module of this folder but this one is a command; what they are made of lies in packages below."""
    found = pkgutil.iter_modules([str(Path(__file__).parent)])
    return [module.name for module in found if not module.ispkg and module.name != Path(__file__).stem]


def load_command(name: str) -> Command:
    return import_module(f"crosscode.commands.{name}").COMMAND


def _dispatch(arguments: list[str]) -> None:
    if not arguments:
        raise InputError("no command given; `crosscode --help` lists them")
    name, *rest = arguments
    if name in ("--help", "-h") and rest and rest[0] in command_names():
        name, rest = rest[0], ["--help", *rest[1:]]
    if name in ("--help", "-h"):
        from crosscode.commands.parts.help import overview

        print(overview({each: load_command(each) for each in command_names()}, DESCRIPTION, EXIT_CODES))
    elif name == "--version":
        print(f"crosscode {version('crosscode')}")
    elif name in command_names():
        if name not in ("train", "evaluate", "harvest") and n_ranks() > 1:
            if os.environ.get("RANK", "0") != "0":  # the first says it
                raise SystemExit(EXIT_BAD_INPUT)
            raise InputError(
                f"{name}: runs in one process: start it without torchrun, which is for `crosscode train`, `evaluate`, `harvest`"
            )
        from crosscode.commands.parts.start import start

        start(load_command(name), name, rest)
    else:
        near = get_close_matches(name, [*command_names(), "--help", "--version"], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(command_names())}"
        if name.startswith("-") and not near:
            hint = f"options stand behind it, as in `crosscode train CONFIG.yaml {name} ...`"
        raise InputError(f"unknown command {name!r}; {hint}")


def _guarded(command: Callable[[], None]) -> int:
    """Run a command; errors a user can act on become one line."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    for ours in ("crosscode", "crosscode_kernels"):
        logging.getLogger(ours).setLevel(logging.INFO)
    try:
        with _terminations_heard():
            command()
    except _Terminated as error:
        return _say_once(f"stopped by {error.signal.name}", 128 + error.signal)
    except Interrupted as error:
        return _say_once(error, EXIT_INTERRUPTED)  # the run of the others is none that could be resumed
    except RankLost as error:
        return _say(error, EXIT_RANK_LOST)
    except KeyboardInterrupt:
        return _say_once("stopped by Ctrl-C", EXIT_CTRL_C)
    except InputError as error:
        return _say(error, EXIT_BAD_INPUT)
    except CrosscodeError as error:
        return _say(error, EXIT_FAILED)
    except BrokenPipeError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "; free some space; a run goes on with: crosscode train --resume RUN" if full else ""
        place = f"{str(error.filename)[:200]!r}: " if error.filename is not None else ""
        what = error.strerror or next(iter(str(error).splitlines()), type(error).__name__)
        no_path = error.errno in (errno.ENAMETOOLONG, errno.ELOOP)
        return _say(f"{place}{what}{advice}", EXIT_BAD_INPUT if no_path else EXIT_FAILED)
    return 0


class _Terminated(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int):
        self.signal = signal.Signals(number)


@contextmanager
def _terminations_heard() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP, unless they are ignored or somebody listens, leave through every `finally`."""

    def leave(number: int, frame: object) -> None:
        raise _Terminated(number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    main = threading.current_thread() is threading.main_thread()
    heard = [number for number in numbers if main and signal.getsignal(number) is signal.SIG_DFL]
    for number in heard:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, signal.SIG_DFL)


def _say_once(problem: object, code: int) -> int:
    """Of several processes the first speaks."""
    return _say(problem, code) if is_first() else code


def _say(problem: object, code: int) -> int:
    print(f"crosscode: {problem}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
