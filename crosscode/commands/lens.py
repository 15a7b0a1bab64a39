"""`crosscode lens`: what fine-tuning changed, without training anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt

from crosscode.commands.parts.command import Command, TrustOptions
from crosscode.commands.parts.libraries import quiet_libraries
from crosscode.commands.parts.options import merged
from crosscode.commands.parts.text_config import text_config
from crosscode.config.data import HarvestConfig
from crosscode.config.reading import read_trusted
from crosscode.errors import InputError

if TYPE_CHECKING:
    from crosscode.data.harvest.harvester import ActivationHarvester
    from crosscode.evaluation.difference_lens import MeanDifference

TEXT = """what fine-tuning changed, read from mean differences of activations, without training
Activation difference lens (Minder et al. 2025). The mean activation of the first model is taken from that of each
further one, at the first positions of `data.source` and over all of it. The tokens shown are those that the
difference promotes through that model's final norm and unembedding. Any text will do: it need not be about what was
fine-tuned. CONFIG.yaml is that of a run with two or more language models (a file, a run directory, a recipe's name),
of which only the fields below are read; without it, give these as options."""


class Options(TrustOptions):
    config: str | None = Field(default=None, title="CONFIG.yaml")
    """what to take the fields below from"""
    n_tokens: PositiveInt = 20_000
    """usable tokens to look at"""
    first: NonNegativeInt = 5
    """positions at the start of a text that are shown one by one"""
    n: PositiveInt = 8
    """tokens shown for each"""


def run(options: Options, fields: Callable[[type[BaseModel]], dict[str, Any]]) -> None:
    from crosscode.build.data import Activations, build_token_loader, open_activations
    from crosscode.build.foresight import check_language_models
    from crosscode.data.norms import NormLimit
    from crosscode.evaluation.difference_lens import check_widths, mean_differences

    values = merged(
        read_trusted(options.config, options.trust_remote_code) if options.config else {}, fields(HarvestConfig)
    )
    config = text_config(merged(values, {"data": {"cache": None}}))
    names = [lm.short_name() for lm in config.language_models]
    if len(names) < 2:
        raise InputError(f"language_models: a difference needs at least two, got {len(names)}")
    quiet_libraries()
    foreseen = check_language_models(config)
    for m in range(1, len(names)):
        if foreseen is not None:
            check_widths(foreseen, 0, m)
    activations = Activations(config=config, **open_activations(config))
    ratio = config.data.max_norm_ratio
    for m in range(1, len(names)):
        loader = build_token_loader(activations, heldout=False)
        found = mean_differences(
            activations.harvester,
            loader,
            model_b=m,
            n_tokens=options.n_tokens,
            n_first=options.first,
            limit=None if ratio is None else NormLimit(ratio),
            groupings=loader.groupings,
        )
        for hookpoint in config.hookpoints:
            of_hookpoint = [one for one in found if one.hookpoint == hookpoint]
            print(f"{names[m]} - {names[0]} at {hookpoint}, {of_hookpoint[-1].n_tokens} tokens")
            print("\n".join(_lines(activations.harvester, of_hookpoint, m, options.n)))


def _lines(harvester: ActivationHarvester, found: list[MeanDifference], m: int, n: int) -> list[str]:
    """A line for each position; norms are shares of that of the first model's activations."""
    from crosscode.commands.parts.reading import LatentLogits
    from crosscode.data.harvest.unembedding import unembed

    if not any(one.norm_of_difference for one in found):
        return ["no difference: the activations are equal"]
    rows = [("all" if one.position is None else str(one.position), one) for one in found]
    rows += [(f"{kind} {name}", one) for kind, of in found[-1].groups.items() for name, one in of.items()]
    width = max(8, *(len(place) for place, _ in rows))
    lines = [f"{'position':<{width}}  |mean|/|x|  |mean|/|difference|  promoted tokens"]
    for place, one in rows:
        shown, of_difference = "", 0.0
        if one.norm_of_difference:
            of_difference = one.norm / one.norm_of_difference
            model = harvester.models[m]
            logits = LatentLogits(unembed(model, one.mean_D[None])[0].cpu(), model.tokenizer)
            shown = " ".join(f"'{token}'" for token, _ in logits.top(n))
        lines.append(f"{place:>{width}}  {one.norm / one.norm_of_a:>10.4f}  {of_difference:>19.3f}  {shown}".rstrip())
    return lines


COMMAND = Command(TEXT, run, Options, positional="config", outline=HarvestConfig)
