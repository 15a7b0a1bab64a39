"""Skip transcoders: start from the best constant, everything else to be learned (Paulo et al. 2025, arXiv:2501.18823).

Axes: Xi/Xo input/output crosscoding dims · Di/Do widths · I flattened input · L latents.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from crosscode.config.registry import ConfigModel
from crosscode.errors import InputError
from crosscode.models.coder import Coder
from crosscode.models.initialization.base import INITIALIZATIONS, InitStrategy, SampleBatches, random_directions, zero_


def mean_input_and_target(samples: SampleBatches, n_tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Means `(x_XiDi, y_XoDo)` over the first `n_tokens` of a sample, summed in float64."""
    sum_x: Tensor | float = 0.0
    sum_y: Tensor | float = 0.0
    n = 0
    for input_BXiDi, target_BXoDo in samples():
        take = min(n_tokens - n, input_BXiDi.shape[0])
        sum_x = sum_x + input_BXiDi[:take].double().sum(0)
        sum_y = sum_y + target_BXoDo[:take].double().sum(0)
        n += take
        if n >= n_tokens:
            break
    if n == 0:
        raise InputError("init: the sample of activations is empty")
    return torch.as_tensor(sum_x / n).to(like), torch.as_tensor(sum_y / n).to(like)


@INITIALIZATIONS.register
class ZeroDecSkipInit(InitStrategy):
    """`W_dec = 0`, `W_skip = 0`, `b_dec = mean(y)`, random encoder directions, `b_enc = -W_enc . mean(x)` or 0."""

    class Config(ConfigModel):
        type: Literal["zero_dec_skip"] = "zero_dec_skip"
        enc_init_norm: PositiveFloat = 1.0
        """norm of each latent's encoder vector at the start, over all input positions"""
        centre_encoder: bool = True
        """whether the encoder bias takes the mean input away; else it is 0"""
        n_mean_tokens: PositiveInt = 65536
        """tokens of the sample that the means are taken over"""

    needs_data = True

    @torch.no_grad()
    def init_weights(self, model: Coder, generator: torch.Generator, samples: SampleBatches | None = None) -> None:
        assert samples is not None
        W_enc_LI = random_directions(tuple(model.W_enc_LI.shape), self.enc_init_norm, generator, model.W_enc_LXiDi)
        model.W_enc_LXiDi.copy_(W_enc_LI.reshape(model.W_enc_LXiDi.shape))
        zero_(model.b_enc_L, model.W_dec_LXoDo)
        self.init_skip(model, generator)
        if model.b_enc_L is not None and self.centre_encoder:
            x_XiDi, _ = mean_input_and_target(samples, self.n_mean_tokens, model.W_enc_LXiDi)
            model.b_enc_L.copy_(-(W_enc_LI @ x_XiDi.flatten()))
        self.init_output_bias(model, samples)

    def init_skip(self, model: Coder, generator: torch.Generator) -> None:
        """Fill `W_skip`, where there is one."""
        zero_(model.W_skip_XiDiXoDo)

    @torch.no_grad()
    def init_output_bias(self, model: Coder, samples: SampleBatches | None) -> None:
        if model.b_dec_XoDo is None:
            return
        assert samples is not None
        x_XiDi, y_XoDo = mean_input_and_target(samples, self.n_mean_tokens, model.b_dec_XoDo)
        zero_(model.b_dec_XoDo)
        no_latents_BL = x_XiDi.new_zeros(1, model.n_latents)
        # A linear skip maps mean to mean, so the bias makes up for the rest.
        model.b_dec_XoDo.copy_(y_XoDo - model.decode(no_latents_BL, x_XiDi[None])[0])
