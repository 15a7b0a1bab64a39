"""Where text comes from, as a user can set it. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from crosscode.config.language_models import LanguageModelConfig
from crosscode.config.registry import ConfigModel, Printable


class DemoCorpus(ConfigModel):
    """The embedded corpus: sources of the standard library, and its reference manual."""

    type: Literal["demo"] = "demo"
    split: Literal["train", "heldout"] = "train"
    """which documents; the split depends on the documents' names only"""
    domains: list[Literal["code", "manual"]] = Field(default=["code", "manual"])
    """kinds of text"""
    plant: Literal["statement", "fact", "style"] | None = None
    """a known change put into the text; `statement` is what `demo:planted` was fine-tuned on (with domains: [code])"""


class HubDataset(ConfigModel):
    """A data set of the hub, read with `datasets`."""

    type: Literal["hub"]
    name: Printable
    """hub name"""
    subset: str | None = None
    """configuration of the data set"""
    split: str = "train"
    """split to read"""
    revision: str | None = None
    """git revision"""
    column: str = "text"
    """column with text, token ids or chat messages"""
    streaming: bool = True
    """read while training instead of downloading first"""


class LocalDataset(ConfigModel):
    """A file, a folder of files (.txt, .jsonl, .parquet, .arrow, .csv), or a folder written by `save_to_disk`."""

    type: Literal["local"]
    path: Printable
    """file or folder"""
    split: str = "train"
    """split of a saved data set"""
    column: str = "text"
    """column with text, token ids or chat messages"""
    streaming: bool = False
    """read without converting the whole first"""
    text_unit: Literal["document", "paragraph", "line"] = "document"
    """what one document of a text file is"""


class Sampling(ConfigModel):
    """How a language model's next token is drawn; what its own `generation_config` says is passed over."""

    temperature: float = Field(default=1.0, ge=0, le=10)
    """0: the most probable token each time"""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """among the most probable tokens that have this share together"""
    top_k: NonNegativeInt = 0
    """among so many of the most probable tokens; 0: all"""

    @model_validator(mode="after")
    def _drawn_from_numbers(self) -> Sampling:
        if 0 < self.temperature < 0.01:
            raise ValueError(f"temperature = {self.temperature}: must be 0, or from 0.01 to 10")
        return self


class Rollouts(ConfigModel):
    """What a language model itself writes: generated once, kept in a folder, read like any other text."""

    type: Literal["rollouts"]
    model: str | LanguageModelConfig
    """who writes: the name of one of language_models, or a model as they are given there"""
    prompts: Annotated[DemoCorpus | HubDataset | LocalDataset, Field(discriminator="type")]
    """chats, of which it answers the last message that is not the assistant's, or texts, of which it goes on from the
    beginning"""
    n_prompts: PositiveInt | None = None
    """the first so many different ones; null: all"""
    prompt_tokens: PositiveInt = 32
    """tokens of a text that are given"""
    sampling: Sampling = Sampling()
    """how tokens are drawn"""
    max_new_tokens: PositiveInt = 256
    """tokens after which it is stopped"""
    batch_size: PositiveInt = 16
    """prompts at once; a batch is what a kill may lose, and each has a seed of its own"""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """seed of what is drawn"""
    folder: Printable | None = None
    """where it is kept; null: a folder of its own in ~/.cache/crosscode ($XDG_CACHE_HOME)"""

    @model_validator(mode="after")
    def _has_an_end(self) -> Rollouts:
        if self.n_prompts is None and isinstance(self.prompts, HubDataset) and self.prompts.streaming:
            raise ValueError("n_prompts: must be given where prompts are streamed from the hub, which may have no end")
        return self


OneSource = Annotated[DemoCorpus | HubDataset | LocalDataset | Rollouts, Field(discriminator="type")]


class MixturePart(ConfigModel):
    """One of the texts of a mixture."""

    source: OneSource
    """text"""
    weight: PositiveFloat = 1.0
    """how often a document comes from it, relative to the other parts"""


class Mixture(ConfigModel):
    """Several texts, read as one by weight."""

    type: Literal["mixture"]
    parts: list[MixturePart] = Field(min_length=1)
    """texts and their weights, such as [{source: {type: local, path: code.jsonl}, weight: 2}, ...]"""
    stop: Literal["first", "all"] = "first"
    """an epoch ends with the first text that ends (no document comes twice; the next epoch reads streams on), or when all
    were read once (shorter ones start again)"""


AnyText = DemoCorpus | HubDataset | LocalDataset | Rollouts | Mixture
Source = Annotated[AnyText, Field(discriminator="type")]


def rollouts_in(source: Any, field: str) -> Iterator[tuple[str, Rollouts]]:
    """What of a source a language model writes first, each with its place."""
    parts = [(field, source)]
    if isinstance(source, Mixture):
        parts = [(f"{field}.parts.{i}.source", part.source) for i, part in enumerate(source.parts)]
    yield from ((place, part) for place, part in parts if isinstance(part, Rollouts))
