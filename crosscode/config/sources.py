"""Where text comes from, as a user can set it. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from crosscode.config.registry import ConfigModel


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
    name: str
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
    path: str
    """file or folder"""
    split: str = "train"
    """split of a saved data set"""
    column: str = "text"
    """column with text, token ids or chat messages"""
    streaming: bool = False
    """read without converting the whole first"""
    text_unit: Literal["document", "paragraph", "line"] = "document"
    """what one document of a text file is"""


OneSource = Annotated[DemoCorpus | HubDataset | LocalDataset, Field(discriminator="type")]


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


Source = Annotated[DemoCorpus | HubDataset | LocalDataset | Mixture, Field(discriminator="type")]
