"""What a user can set of activations of their own, with meanings and defaults. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from crosscode.config.registry import ConfigModel, NamedByPath, Printable


class ArrayFile(NamedByPath):
    """A file of activations; its path alone will do."""

    path: Printable
    """safetensors, npy or parquet file, or the folder of a store"""
    key: str | None = None
    """tensor or column, where the file has several"""


class ArraysSource(ConfigModel):
    """Activations of your own in place of text and language models: rows (D,), (P, D) or (M, P, D)."""

    type: Literal["arrays"]
    files: list[ArrayFile] = Field(default=[])
    """one file with all positions, or one for each; none: they were passed to `crosscode.train` in Python"""
    heldout_files: list[ArrayFile] = Field(default=[])
    """the same of activations for evaluation; none: the last `validation_fraction` of the rows"""
    names: list[list[str]] = Field(default=[["acts"]], min_length=1)
    """name of each position, a list for each model"""
    origin: str = "files"
    """what the activations were, for people"""

    @model_validator(mode="after")
    def _names_of_positions(self) -> ArraysSource:
        flat = [name for names in self.names for name in names]
        if len({len(names) for names in self.names}) > 1 or not flat:
            raise ValueError(f"names = {self.names}: every model needs a name for each of the same hookpoints")
        if len(set(flat)) < len(flat):
            raise ValueError(f"names: {max(flat, key=flat.count)!r} is there twice")
        return self
