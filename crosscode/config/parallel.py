"""What a user can set of several processes. No torch here."""

from __future__ import annotations

from pydantic import PositiveFloat, PositiveInt

from crosscode.config.registry import ConfigModel


class ParallelConfig(ConfigModel):
    """What of the language models each process of `torchrun` holds; latents are spread over all processes in any case."""

    model: PositiveInt = 1
    """processes that hold a language model together, split by the tensor-parallel plan that `transformers` has for it; must
    divide their number"""
    apart: bool = False
    """each language model on processes of its own, in place of all on each: of two models and eight processes each on four"""
    timeout: PositiveFloat = 30
    """minutes for which a process waits for another that neither answers nor ends; longer than rank 0 may read or write alone"""
