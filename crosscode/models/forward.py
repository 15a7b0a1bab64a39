"""What one training forward pass yields.

Axes: B tokens · Xi/Xo input/output crosscoding dims · Di/Do input/output width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from crosscode_kernels.checks import autocast_dtype
from crosscode_kernels.recon_loss import ReconLoss
from crosscode_kernels.sparse import Latents
from torch import Tensor

from crosscode.models.coder import Coder


@dataclass(frozen=True)
class ForwardResult:
    """The latents of `input_BXiDi`, and whichever is asked for: the output, or its loss, which needs no output. What
    `forward_train` of a `model` returns."""

    model: Coder
    input_BXiDi: Tensor
    latents: Latents
    latents_of_parts: tuple[Latents, ...]
    """as the encoders of `BaseCrosscoder.parts` gave them, with all that they kept; one unless the model is compound"""

    _autocast: torch.dtype | None = field(repr=False)
    _output: list[Tensor] = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, model: Coder, input_BXiDi: Tensor, latents: Latents, *parts: Latents) -> ForwardResult:
        """What is asked for later is computed under the autocast of now, as the latents were."""
        return cls(model, input_BXiDi, latents, parts or (latents,), autocast_dtype(input_BXiDi.device.type))

    @property
    def output_BXoDo(self) -> Tensor:
        """The reconstruction, computed when it is first asked for; differentiable."""
        # Not a cached_property: its lock cannot be traced by torch.compile.
        if not self._output:
            with self._as_at_encoding():
                self._output.append(self.model.decode_parts(self.latents_of_parts, self.input_BXiDi))
        return self._output[0]

    def recon_loss(self, target_BXoDo: Tensor) -> ReconLoss:
        """Squared error of the reconstruction, in total and by position; and the residual, detached."""
        with self._as_at_encoding():
            return self.model.recon_loss(self.latents_of_parts, self.input_BXiDi, target_BXoDo)

    def _as_at_encoding(self) -> AbstractContextManager[object]:
        device = self.input_BXiDi.device.type
        if device == "meta":  # which has no autocast to turn off
            return nullcontext()
        return torch.autocast(device, self._autocast, enabled=self._autocast is not None)
