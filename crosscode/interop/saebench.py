"""An SAE as SAEBench takes one.

Axes: D width · L latents.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from crosscode.config.hookpoints import layer_of
from crosscode.errors import InputError
from crosscode.interop.export import planned
from crosscode.interop.plain import SINGLE, to_model
from crosscode.models.base import BaseCrosscoder


@dataclass
class SAEBenchConfig:
    """The fields that SAEBench reads of a coder's `cfg`."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int | None
    hook_name: str
    context_size: int = 128
    hook_head_index: int | None = None
    architecture: str = ""
    apply_b_dec_to_input: bool = False
    finetuning_scaling_factor: bool = False
    activation_fn_str: str = ""
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    prepend_bos: bool = True
    normalize_activations: str = "none"
    dtype: str = "float32"
    device: str = "cpu"
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -100_000
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class SAEBenchCoder(nn.Module):
    """`W_enc [D, L]`, `W_dec [L, D]` with rows of norm 1, `b_enc [L]`, `b_dec [D]`, `cfg`, `device`, `dtype`, `encode`, `decode`,
    `forward`: what SAEBench asks of an object. Latents are ours times their decoder norms; one that writes nothing is 0, and
    its row is the first unit vector.

    Args:
        model: an SAE with scaling folded in, of any activation; or a crosscoder of one model and one hookpoint.
        model_name: default: what the model says of itself.
        hook_name: default: what the model says of itself.

    Raises:
        InputError: it is no SAE, or names that it does not know are not given.
    """

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_enc: nn.Parameter
    b_dec: nn.Parameter
    norm_L: Tensor

    def __init__(self, model: BaseCrosscoder, model_name: str | None = None, hook_name: str | None = None):
        super().__init__()
        coder = planned(model)[0]
        if coder.kind != SINGLE or coder.is_transcoder or coder.has_skip or coder.d_in != coder.d_out:
            raise InputError(f"SAEBench measures SAEs, and this is a {type(model).__name__} that is none; give one")
        model_name = model_name or coder.model_name
        hook_name = hook_name or (coder.inputs[0][1] if coder.inputs else None)
        for name, value in (("model_name", model_name), ("hook_name", hook_name)):
            if value is None:
                raise InputError(f"{name}: the model does not say it; give it")
        self.model = to_model(coder)
        part = coder.part
        n_L = part.W_dec_LXoDo.norm(dim=1)
        unit_LD = torch.where(n_L[:, None] > 0, part.W_dec_LXoDo / n_L[:, None], torch.eye(1, coder.d_in))
        self.register_buffer("norm_L", n_L)
        for name, weight in (
            ("W_enc", (part.W_enc_LXiDi * n_L[:, None]).T.contiguous()),
            ("W_dec", unit_LD),
            ("b_enc", coder.with_pre_bias(False).part.b_enc_L * n_L),
            ("b_dec", coder.b_dec_XoDo.clone()),
        ):
            self.register_parameter(name, nn.Parameter(weight))
        self.cfg = SAEBenchConfig(
            model_name or "", coder.d_in, part.n_latents, layer_of(hook_name or ""), hook_name or ""
        )
        self.cfg.architecture = part.kind

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.W_dec.dtype

    def encode(self, x: Tensor) -> Tensor:
        """Latents `[..., L]` of raw activations `x [..., D]`."""
        flat_BL = self.model.encode(x.reshape(-1, x.shape[-1]).to(self.model.dtype))
        return (flat_BL * self.norm_L).reshape(*x.shape[:-1], -1).to(self.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Raw activations `[..., D]` of `latents [..., L]`."""
        return latents.to(self.dtype) @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction `[..., D]` of `x [..., D]`."""
        return self.decode(self.encode(x))
