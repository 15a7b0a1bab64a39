"""`crosscode export`: a trained model as the files of another library."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from crosscode.commands.parts.command import Command
from crosscode.commands.parts.libraries import quiet_libraries
from crosscode.config.registry import ConfigModel
from crosscode.errors import InputError

TEXT = """write a trained model as saelens, circuit-tracer, sparsify, dictionary-learning or kissane
RUN is a run directory or the folder of a saved model; circuit-tracer takes several, a transcoder for each layer. What a
format cannot hold is refused with the reason. `crosscode export --check CONFIG.yaml --to FORMAT` answers before training."""


class Options(ConfigModel):
    runs: list[str] = Field(title="RUN")
    """run directory, or the folder of a saved model; with --check a config"""
    to: str = Field(title="FORMAT")
    """saelens, circuit-tracer, sparsify, dictionary-learning or kissane"""
    out: Path | None = Field(default=None, title="DIR")
    """a new folder"""
    position: str | None = Field(default=None, title="NAME")
    """one output position alone, such as base/blocks.3.hook_resid_post: of a cross-layer transcoder a transcoder, of a
    crosscoder an SAE"""
    overwrite: bool = False
    """replace an earlier export of this format"""
    check: bool = False
    """write nothing: say whether what these configs train could be exported"""
    trust_remote_code: bool = False
    """with --check: let a run's language models run code of their own, where its config says so"""


def run(options: Options) -> None:
    quiet_libraries()
    if options.check:
        from crosscode.build.planned import check_export

        print(check_export(options.runs, options.to, options.position, options.trust_remote_code))
        return
    if options.out is None:
        raise InputError("export: no --out DIR given: the folder to write")
    from crosscode.interop.export import check_target, export, writing_format
    from crosscode.models import BaseCrosscoder
    from crosscode.trainers.progress import at_work
    from crosscode.trainers.warm_start import find_model

    check_target(options.out, writing_format(options.to), overwrite=options.overwrite)
    with at_work("export"):
        models = [BaseCrosscoder.load(find_model(each, "RUN")) for each in options.runs]
        done = export(models, options.to, options.out, position=options.position, overwrite=options.overwrite)
    print(done)


COMMAND = Command(TEXT, run, Options, positional="runs")
