"""How a model is written, exported and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from crosscode_kernels import AnyBackend

from crosscode.models import checkpoint
from crosscode.models.elsewhere import elsewhere
from crosscode.models.weights import CoderWeights


class CoderFiles(CoderWeights):
    """The part of `BaseCrosscoder` that knows of files."""

    def save(
        self,
        path: str | Path,
        metadata: dict[str, Any] | None = None,
        *,
        max_shard_size: int | str = checkpoint.MAX_SHARD_SIZE,
    ) -> None:
        """Write `model.safetensors` and `config.json` into the folder `path`, whole or not at all.

        Args:
            metadata: JSON values that belong to the weights, such as models and hookpoints; default: `self.metadata`.
            max_shard_size: bytes, or "500MB"; where weights are more, they are several files, `model-00001-of-00003.safetensors`,
                beside `model.safetensors.index.json`. A tensor is not cut: a larger one has a file of its own.

        Raises:
            InputError: `max_shard_size` is no size, or `path` a link.
        """
        about = dict(self.metadata if metadata is None else metadata)
        checkpoint.save_model(self, Path(path), about, max_shard_size)

    def export(self, to: str, path: str | Path, *, position: str | None = None, overwrite: bool = False) -> Path:
        """Write the model into the new folder `path` as another library has it; returns that folder.

        Args:
            to: "saelens", "circuit-tracer", "sparsify", "dictionary-learning" or "kissane".
            position: write one output position of it alone, by its name (`position_names`).
            overwrite: replace an earlier export that is there.

        Raises:
            InputError: what the format cannot hold, with what would work; a folder that is there already.
        """
        return elsewhere("export")([self], to, Path(path), position=position, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path, *, backend: AnyBackend = "auto", device: str | torch.device = "cpu") -> Self:
        """A saved model, equal to the bit, in eval mode; or that of another library's file or folder. It takes raw
        activations: the scaling of a run's checkpoint, whose model is unfolded, is folded in.

        Raises:
            InputError: a missing folder, another architecture, or tensors whose names, shapes or dtypes differ.
        """
        return checkpoint.load_model(cls, Path(path), backend=backend, device=torch.device(device))

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None, **options: Any) -> Self:
        """As `load`, with its options, of a folder or of a repository USER/NAME on the Hugging Face hub (`revision`: a
        branch, tag or commit).

        Raises:
            InputError: no such folder or repository, or no way to the hub.
        """
        path = Path(name) if Path(name).exists() else elsewhere("fetch")(str(name), revision)
        return cls.load(path, **options)
