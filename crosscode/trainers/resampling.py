"""Dead latents begin anew at what is reconstructed worst (Bricken et al. 2023, "Towards Monosemanticity", neuron resampling).

Axes: B tokens · I, O flattened input and output of a source layer · X output positions · L latents · R those that begin anew.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from crosscode.models.base import BaseCrosscoder
from crosscode.seeds import derived_seed

log = logging.getLogger("crosscode")

FIRST_LOOK = 10
"""Steps until `from_start` looks for the first time; then after twice as many, and so on."""


@torch.no_grad()
def resample_if_due(trainer: Any, input_BXiDi: Tensor, target_BXoDo: Tensor) -> None:
    """Behind a step on this batch, where `train.resample` says so. What is drawn depends on its seed and the step alone."""
    config, dead_after = trainer.config.resample, dead_after_tokens(trainer)
    if config is None or dead_after is None:
        return
    model, silence_L = trainer.model, trainer.firing.tokens_since_fired_L
    generator = torch.Generator().manual_seed(derived_seed(config.seed, trainer.step))
    with trainer.forward.autocast():
        parts = input_BXiDi.chunk(trainer.config.grad_accumulation)
        error_BXD = (torch.cat([model(part) for part in parts]) - target_BXoDo).reshape(
            len(input_BXiDi), -1, model.d_out
        )
    target_BXD, begun = target_BXoDo.reshape(error_BXD.shape), []
    of_parts = zip(
        model.parts, model.outputs_of_parts, silence_L.split([p.n_latents for p in model.parts]), strict=True
    )
    for (part, outputs, own_silence_L), own_BXiDi in zip(of_parts, model.inputs_of_parts(input_BXiDi), strict=True):
        x_BI = part.encoder_input(own_BXiDi)
        y_BO, error_B = target_BXD[:, outputs].flatten(1), error_BXD[:, outputs].flatten(1).square().sum(1)
        dead_L = own_silence_L >= dead_after
        rows_R = begin_anew_(part, x_BI, y_BO, error_B, dead_L, config.encoder_scale, generator)
        own_silence_L[rows_R] = 0
        begun.append((part, rows_R, x_BI.mean(0)))
    for constraint in trainer.constraints:
        constraint.after_step(model)
    for part, latents_R, centre_I in begun:
        if part.b_enc_L is not None:
            W_enc_RI = part.ops.rows_of(part.W_enc_LI, latents_R)
            part.b_enc_L[latents_R] = -(W_enc_RI @ centre_I).to(part.b_enc_L.dtype)
        weights, others = (part.W_enc_LXiDi, part.W_dec_LXoDo), (part.b_enc_L, *part.activation_fn.parameters())
        for params, rows in ((weights, part.found_here(latents_R)[1]), (others, latents_R)):
            for param in params:
                if param is not None:
                    trainer.optimizer_plan.forget_rows(trainer.optimizer, param, rows)
    if n := sum(len(rows_R) for _, rows_R, _ in begun):
        log.info("step %d: %d dead latents begin anew", trainer.step, n)


def dead_after_tokens(trainer: Any) -> int | None:
    """For how many tokens a latent must have been silent to begin anew at this step; None: none does."""
    config, step = trainer.config.resample, trainer.step
    if config is None or step > config.until * trainer.n_steps:
        return None
    if step % config.every == 0:
        return config.dead_after_tokens or trainer.config.dead_after_tokens
    looks = step // FIRST_LOOK
    if config.from_start and step < config.every and step in (FIRST_LOOK * 2**i for i in range(looks.bit_length())):
        return trainer.tokens if looks == 1 else trainer.tokens // 2
    return None


def begin_anew_(
    part: BaseCrosscoder,
    x_BI: Tensor,
    y_BO: Tensor,
    error_B: Tensor,
    dead_L: Tensor,
    encoder_scale: float,
    generator: torch.Generator,
) -> Tensor:
    """Each dead latent gets a token of its own, drawn by the square of its loss. It reads what sets the token apart from the mean
    of the batch and writes what sets its target apart: with the mean norm of live decoder rows, and `encoder_scale` times
    that of encoder rows. Thresholds are the mean of live ones. Returns the rows; where more are dead than there are tokens,
    the first. Encoder biases are the caller's."""
    chance_B = error_B.double().square().nan_to_num(0, 0, 0).cpu()
    n = min(int(dead_L.sum()), int((chance_B > 0).sum()))
    rows_R = dead_L.nonzero().squeeze(1)[:n]
    if n == 0:
        return rows_R
    token_R = chance_B.multinomial(n, generator=generator).to(dead_L.device)
    live_L = ~dead_L if not bool(dead_L.all()) else dead_L
    live_N, (here_R, found_R) = live_L.nonzero().squeeze(1), part.found_here(rows_R)
    for weight_L, v_BD, scale in ((part.W_enc_LXiDi, x_BI, encoder_scale), (part.W_dec_LXoDo, y_BO, 1.0)):
        norm = part.ops.rows_of(weight_L.flatten(1).norm(dim=1), live_N).mean()
        anew_RD = scale * norm * normalize(v_BD[token_R] - v_BD.mean(0), dim=1)
        weight_L[found_R] = anew_RD[here_R].reshape(-1, *weight_L.shape[1:]).to(weight_L.dtype)
    for threshold_L in part.activation_fn.parameters():
        threshold_L[rows_R] = threshold_L[live_L].mean(0)
    return rows_R
