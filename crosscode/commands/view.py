"""`crosscode view`: the explorer of a run, served to a browser on this machine, or at the other end of ssh."""

from __future__ import annotations

from pydantic import Field

from crosscode.commands.parts.command import Command, RunOptions
from crosscode.commands.parts.libraries import quiet_libraries


class Options(RunOptions):
    run_dir: str = Field(title="RUN")
    """run directory, with what `crosscode report RUN` writes; or USER/NAME on the hub"""
    port: int = Field(default=8000, ge=0, le=65535, title="N")
    """where it listens on 127.0.0.1; 0: a free one"""


def run(options: Options) -> None:
    from crosscode.commands.parts.viewing import ReportServer

    quiet_libraries()
    with ReportServer(options.run_dir, options.port, options.trust_remote_code) as server:
        print(f"{server.url}  (for this machine alone; Ctrl-C ends it)", flush=True)
        server.serve_forever()


COMMAND = Command(
    "serve RUN/report on this machine: keeps notes in the run, encodes prompts", run, Options, positional="run_dir"
)
