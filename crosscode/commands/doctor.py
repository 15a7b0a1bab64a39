"""`crosscode doctor`: does everything work on this machine, and how fast is its disk?"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from pydantic import Field, NonNegativeFloat

from crosscode.commands.parts.command import Command
from crosscode.config.registry import ConfigModel
from crosscode.errors import CrosscodeError, InputError


class Options(ConfigModel):
    seconds: NonNegativeFloat = 10.0
    """time for the self-test"""
    folder: Path = Field(default=Path("."), title="DIR")
    """where to measure the disk"""


def run(options: Options) -> None:
    if not options.folder.is_dir():
        raise InputError(f"--folder = {str(options.folder)!r}: no such folder")
    from crosscode.commands.parts.self_test import examine

    logging.getLogger("crosscode_kernels").setLevel(logging.WARNING)  # what it chose for toy sizes is of no interest
    print(f"tests of the kernels take about {options.seconds:.0f} s", file=sys.stderr)
    n_failed = 0
    for check in examine(options.folder, options.seconds):
        print(check, flush=True)
        n_failed += check.ok is False
    if n_failed:
        raise CrosscodeError(f"{n_failed} check(s) failed")
    print("everything that was tested works")


COMMAND = Command("versions, devices, a self-test of the kernels on this machine, disk speed", run, Options)
