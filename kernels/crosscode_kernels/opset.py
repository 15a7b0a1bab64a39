"""The op set: one Protocol that every backend implements, and the rule that picks a backend.

Axes: B tokens · I flattened input dims · O flattened output dims · L latents · X crosscoding positions · N non-zeros.

`segments` are the widths of the crosscoding positions along O (they sum to O). Per-X maths takes the boundaries, so
positions of different widths need no special case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from crosscode_kernels.sparse import Latents

BackendName = Literal["auto", "triton", "torch", "reference", "torch:screened", "torch:rows", "torch:screened+rows"]
"""What follows a colon are options of the torch backend: "screened", see `encode_topk.screened`; "rows": weight gradients of
sparse latents are sparse over rows, for `RowSparseAdam`."""
NormMode = Literal["sum", "joint"]


class DecoderNorms(NamedTuple):
    """Norms of decoder rows: `norms_LX` per crosscoding position, `n_L` per latent (sum of them, or joint)."""

    norms_LX: Tensor
    n_L: Tensor


class ReconLoss(NamedTuple):
    """`loss` (scalar): squared error summed over O, mean over B; `per_x_X`: the same split by position."""

    loss: Tensor
    per_x_X: Tensor


class DecodeReconLoss(NamedTuple):
    """`ReconLoss`, and `residual_BO = y - target`, detached."""

    loss: Tensor
    per_x_X: Tensor
    residual_BO: Tensor


class JumpReLUPenalties(NamedTuple):
    """`latents_BL` after JumpReLU, and the two weighted penalties (scalars, mean over B)."""

    latents_BL: Tensor
    tanh: Tensor
    pre_act: Tensor


@runtime_checkable
class OpSet(Protocol):
    """Everything a model or an objective computes. All differentiable where a gradient is defined.

    Encoders return `Latents`; the value of a sparse one carries the gradient. A latent whose value is 0 is not
    active, however it is stored. Ties: the lowest index wins, in every backend.
    """

    name: str

    # ---- encode and select
    def encode_topk(self, x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None, k: int) -> Latents:
        """The k largest of `relu(x W_enc^T + b_enc)` of each token."""
        ...

    def encode_batch_topk(
        self, x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None, k: int, rank_scale_L: Tensor | None = None
    ) -> Latents:
        """The `k * B` largest of the whole batch, ranked by `a_l * rank_scale_l` (1 where None); values unscaled."""
        ...

    def encode_groupmax(self, x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None, k: int) -> Latents:
        """The maximum of each of k contiguous groups of L / k latents of `relu(h)`."""
        ...

    def encode_threshold(
        self,
        x_BI: Tensor,
        W_enc_LI: Tensor,
        b_enc_L: Tensor | None,
        threshold: Tensor,
        rank_scale_L: Tensor | None = None,
    ) -> Latents:
        """`a_l = relu(h_l)` where `a_l * rank_scale_l >= threshold` and `a_l > 0`: inference form of BatchTopK."""
        ...

    def aux_topk(self, x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None, dead_mask_L: Tensor, k: int) -> Latents:
        """`encode_topk` among the latents of `dead_mask_L` only (fewer than k dead: all of them)."""
        ...

    def preacts(self, x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None) -> Tensor:
        """`h_BL = x W_enc^T + b_enc`, dense."""
        ...

    # ---- dense activations with their encoders: dense or sparse latents, as the measured density advises
    def encode_relu(self, x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None) -> Latents:
        """`relu(x W_enc^T + b_enc)`."""
        ...

    def encode_jumprelu(
        self,
        x_BI: Tensor,
        W_enc_LI: Tensor,
        b_enc_L: Tensor | None,
        t_L: Tensor,
        eps: float,
        ste: Literal["anthropic", "gdm"],
    ) -> Latents:
        """`jumprelu(x W_enc^T + b_enc, t)`, with what `pre_act_penalty` needs."""
        ...

    def pre_act_penalty(self, latents: Latents, t_L: Tensor, n_L: Tensor, lambda_L: Tensor) -> Tensor:
        """`pre_act` of latents that come from `encode_jumprelu` with the same `t_L`."""
        ...

    # ---- decode
    def decode(self, latents: Latents, W_dec_LO: Tensor, b_dec_O: Tensor | None = None) -> Tensor:
        """`y_BO = a W_dec + b_dec`. Sparse latents: forward and backward touch active rows only."""
        ...

    # ---- dense activations
    def relu(self, h_BL: Tensor) -> Tensor: ...

    def jumprelu(self, h_BL: Tensor, t_L: Tensor, eps: float, ste: Literal["anthropic", "gdm"]) -> Tensor:
        """`h * 1[h > exp(t)]` with the straight-through gradient for t of SCHEMES section 3."""
        ...

    # ---- norms, penalties, losses
    def decoder_norms(self, W_dec_LO: Tensor, segments: Sequence[int], mode: NormMode) -> DecoderNorms: ...

    def weighted_l1(self, latents: Latents, n_L: Tensor, lambda_L: Tensor) -> Tensor:
        """`mean_B sum_l lambda_l a_l n_l`."""
        ...

    def weighted_tanh(self, latents: Latents, n_L: Tensor, lambda_L: Tensor, c: float) -> Tensor:
        """`mean_B sum_l lambda_l tanh(c a_l n_l)`."""
        ...

    def pre_act(self, h_BL: Tensor, t_L: Tensor, n_L: Tensor, lambda_L: Tensor) -> Tensor:
        """`mean_B sum_l lambda_l relu(exp(t_l) - h_l) n_l`."""
        ...

    def jumprelu_penalties(
        self,
        h_BL: Tensor,
        t_L: Tensor,
        n_L: Tensor,
        lambda_tanh_L: Tensor,
        lambda_pre_L: Tensor,
        *,
        eps: float,
        ste: Literal["anthropic", "gdm"],
        c: float,
    ) -> JumpReLUPenalties:
        """JumpReLU and both penalties in one pass over `h_BL` each way."""
        ...

    def recon_loss(self, y_BO: Tensor, target_BO: Tensor, segments: Sequence[int]) -> ReconLoss: ...

    def decode_recon_loss(
        self, latents: Latents, W_dec_LO: Tensor, b_dec_O: Tensor | None, target_BO: Tensor, segments: Sequence[int]
    ) -> DecodeReconLoss:
        """`recon_loss` of `decode`, for a step that has no other use for the output: it need not be written."""
        ...
