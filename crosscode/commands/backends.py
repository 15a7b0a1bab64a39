"""`crosscode backends`: which kernels work here, and why not."""

from __future__ import annotations

from crosscode.commands.parts.command import Command, NoOptions


def run(options: NoOptions) -> None:
    from crosscode_kernels import available_backends

    for status in available_backends():
        print(f"{status.name:10} {'available' if status.available else 'not available'}  {status.reason}")


COMMAND = Command("which kernels work here, and why not", run)
