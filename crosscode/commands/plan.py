"""`crosscode plan`: what a run would take on several GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, PositiveInt

from crosscode.commands.parts.command import Command, TrustOptions
from crosscode.commands.parts.libraries import quiet_libraries
from crosscode.commands.parts.options import experiment_values, whole_experiment
from crosscode.config.experiment import ExperimentConfig

if TYPE_CHECKING:
    from crosscode.build.plan import Plan

TEXT = """what a run would take on 1 to 512 GPUs: memory, bytes sent, time
Nothing is loaded but the configurations of the language models. Memory and bytes are counted in a step on tensors without
content; times are predictions from peaks of the hardware, and the term that takes most of them is named."""


class Options(TrustOptions):
    """What the command takes beside the fields of a config."""

    config: str = Field(title="CONFIG.yaml")
    """a file, a run directory, or a recipe's name"""
    ranks: PositiveInt | None = None
    """show the parts for this many processes"""
    gpu: Literal["h100", "h200", "a100", "mi300x"] = "h100"
    """what each of them has"""


def run(options: Options, fields: Callable[[type[BaseModel]], dict[str, Any]]) -> None:
    from crosscode.build.plan import COUNTED, GPUS, plan
    from crosscode.build.schema import check_config

    quiet_libraries()
    config = check_config(experiment_values(options.config, fields(whole_experiment()), options.trust_remote_code))
    gpu, wanted = GPUS[options.gpu], options.ranks
    counts = {1 << i for i in range(10)} | ({wanted} if wanted else set())
    plans = plan(config, sorted(counts), gpu)
    print(
        f"{config.name} on {gpu.name}: a step of {config.train.batch_size} tokens, counted with backend "
        f"{COUNTED}; times are predictions"
    )
    print(f"{'ranks':>5}  {'memory':>9}  {'sent a step':>11}  {'harvest':>10}  {'step':>10}  most of it")
    for one in plans:
        print(_line(one, gpu.memory))
    for one in plans:
        if one.ranks == wanted and one.memory and one.sent and one.seconds:
            print(f"\none of {wanted}:")
            for name, n in one.memory.items():
                print(f"  {n / 2**30:9.3f} GiB  {name}")
            for name, n in (one.sent | (one.besides or {})).items():
                print(f"  {n / 1e6:9.3f} MB   sent for the {name}")
            for name, seconds in sorted(one.seconds.items(), key=lambda item: -item[1]):
                print(f"  {1e3 * seconds:9.3f} ms   {name}")


def _line(one: Plan, there: float) -> str:
    if not (one.memory and one.sent and one.seconds):
        return f"{one.ranks:5}  {one.refused}"
    n_bytes, harvest = sum(one.memory.values()), one.seconds["harvest"]
    step = sum(one.seconds.values()) - harvest
    fits = "" if n_bytes <= there else f"; more than the {there / 1e9:.0f} GB of one"
    return (
        f"{one.ranks:5}  {n_bytes / 2**30:5.1f} GiB  {sum(one.sent.values()) / 1e6:8.1f} MB  {1e3 * harvest:7.2f} ms  "
        f"{1e3 * step:7.2f} ms  {one.dominant}{fits}"
    )


COMMAND = Command(TEXT, run, Options, positional="config", outline=ExperimentConfig, whole=whole_experiment)
