"""`crosscode import`: the files of another library as a model of ours."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from crosscode.commands.parts.command import Command, TrustOptions
from crosscode.commands.parts.libraries import quiet_libraries

TEXT = """read a model of saelens, circuit-tracer, sparsify, dictionary-learning, kissane or gemma-scope
PATH is a folder or file as those libraries write it. Without --config DIR becomes a saved model, which load, export and
finetune_from take (the transcoders of all layers become one set of them); with it a run, which evaluate, report and steer
take, too: language models, hookpoints and text are those of the config."""


class Options(TrustOptions):
    path: Path = Field(title="PATH")
    """folder or file; or USER/NAME on the hub, whose files lie at the top of the repository"""
    source_format: str | None = Field(default=None, alias="from", title="FORMAT")
    """one of those names; null: as its files look"""
    out: Path = Field(title="DIR")
    """a new folder"""
    config: str | None = Field(default=None, title="CONFIG.yaml")
    """make a run on the language models, hookpoints and text of this config (a file, a run, or a recipe's name)"""


def run(options: Options) -> None:
    quiet_libraries()
    from crosscode.build.importing import import_model
    from crosscode.interop.hub import foreign
    from crosscode.trainers.progress import at_work

    named = (options.source_format, options.out, options.config, options.trust_remote_code)
    with at_work("import"):
        lines = [*import_model(foreign(options.path), *named)]
    print("\n".join(lines))


COMMAND = Command(TEXT, run, Options, positional="path")
