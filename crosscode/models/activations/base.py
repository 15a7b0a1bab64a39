"""What an activation function is.

Axes: B tokens · I flattened input dims · L latents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple, Self

import torch
from crosscode_kernels import OpSet
from crosscode_kernels.sparse import Latents
from torch import Tensor, nn

from crosscode.config.registry import ConfigModel, Configured, Registry
from crosscode.errors import InputError

NEVER = 1e30
"""A threshold that no pre-activation reaches; finite, so that gradients are."""


class Selection(NamedTuple):
    """What an activation keeps: the `k` largest of each token, or the `k * B` largest of the batch."""

    k: int
    over_batch: bool


class ActivationFunction(Configured, nn.Module, ABC):
    """Turns `x_BI`, `W_enc_LI` and `b_enc_L` into latents. It owns the encode: a sparse activation has a sparse gradient.
    `n_latents` is L.

    A subclass is one file in this folder: a nested `Config`, `encode`, and the plain definition `forward`. The rest
    answers what models, losses and trainers ask of an activation; the answers here are those of ReLU.
    """

    beside = ("n_latents",)
    title: ClassVar[str] = ""
    """name in reports"""
    n_latents: int
    uses_decoder_norms: bool = False
    """Whether `encode` wants `n_L`, the decoder norms, to rank latents."""
    selects_over_batch: bool = False
    """Whether in train mode the latents of one token depend on the other tokens of the batch."""
    is_screened: bool = False
    """Whether its encode can be screened (backend "torch:screened" or "triton:screened")."""
    usual_terms: ClassVar[tuple[str, ...]] = ("recon", "l1")
    """The objective that is trained where none is given, each term with its defaults."""
    usual_init: ClassVar[str | None] = None
    """The initialisation where none is given, if the activation has a say in it."""
    is_sparse: ClassVar[bool] = False
    """Whether latents always come as entries (`SparseLatents`), as no more than `k` of them fire."""
    may_be_either: ClassVar[bool] = False
    """Whether its products are sparse or dense by the share of latents that fire (`sparse_below`)."""
    in_groups: ClassVar[bool] = False
    """Whether `k` contiguous groups of latents, all of one size, select by themselves."""
    keeps_k: ClassVar[bool] = False
    """Whether it keeps the `k` largest latents, for a `k` that may be multiplied and over whatever there is."""
    selects_from: int | None = None
    """Latents of all source layers, where the `k` largest of them are kept; None: those of this one."""
    capturable: bool = False
    """Whether a step with it can be a CUDA graph: while not `is_annealing` it launches the same in each. A subclass says so of
    itself."""
    threshold_travel: float = 0.0
    """How far a run must be able to take its parameters: a learning rate below that over the number of steps is raised to it."""
    k_factor: int = 1
    """By what `k` is multiplied for the moment; see `BaseCrosscoder.k_multiplied`."""

    def _start(self, config: ConfigModel, **beside: Any) -> None:
        nn.Module.__init__(self)
        super()._start(config, **beside)

    @abstractmethod
    def encode(
        self, ops: OpSet, x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None, n_L: Tensor | None = None
    ) -> Latents:
        """Latents of a batch, through the ops of a backend."""

    @abstractmethod
    def forward(self, preacts_BL: Tensor) -> Tensor:
        """The definition: dense latents (B, L) from dense pre-activations."""

    # ---- in training

    def before_step(self, step: int, n_steps: int) -> None:
        """Called at the start of each training step."""
        return None

    @torch.no_grad()
    def after_step(self, latents: Latents, n_L: Tensor | None = None) -> None:
        """Called once per training step with the latents of the whole batch; for running statistics."""
        return None

    @property
    def tracks_batches(self) -> bool:
        """Whether `after_step` does anything."""
        return type(self).after_step is not ActivationFunction.after_step

    def check_evaluated_at(self, step: int) -> None:
        """Raise `InputError` where eval mode cannot work yet at `step`, the first evaluation of a run."""

    def multiply_k(self, factor: int) -> None:
        """From now on keep `factor * k` latents; nothing changes where there is no k."""
        self.k_factor = factor

    @property
    def is_annealing(self) -> bool:
        """Whether it computes in another way at each step for now."""
        return False

    @property
    def most_kept(self) -> int:
        """Latents of a token that eval mode keeps at most (BatchTopK: on average)."""
        return self.n_latents

    def selection(self) -> Selection | None:
        """What would select the same over the latents of several source layers; None: each latent by itself decides."""
        return None

    def ranks(self, latents: Latents, n_L: Tensor | None = None) -> Tensor:
        """What the stored values are ranked by, in their order. `n_L`: decoder norms, of these latents or of more behind them."""
        return latents.value

    def batch_cuts_set(self, cut_of_factor: Mapping[int, Any]) -> AbstractContextManager[None]:
        """Within the block train mode keeps what the `Cut` of the current `k_factor` lets through; for activations that
        select over the batch, and batches in parts."""
        raise NotImplementedError(f"{self.type_name()} does not select over the batch")

    def annealing_over(self) -> AbstractContextManager[None]:
        """Within the block train mode keeps as many as eval mode does."""
        return nullcontext()

    def settle_threshold_(self, threshold: Tensor) -> None:
        """Set the one `threshold` (a scalar) that eval mode applies; for activations that select over the batch."""

    def running_statistics(self) -> tuple[Tensor, ...]:
        """Scalars that go on changing over batches, and may stand elsewhere in a saved model."""
        return ()

    # ---- thresholds

    def log_thresholds_L(self) -> Tensor | None:
        """Log of the learned threshold of each latent, a parameter or computed from one; None: it has none."""
        return None

    def step_bandwidth(self) -> float | None:
        """Width of the window in which the step `1[h > theta]` has a gradient to thresholds that are parameters themselves;
        None: they are not."""
        return None

    def set_thresholds_(self, threshold_L: Tensor) -> None:
        """Set the learned thresholds, which are positive."""
        raise NotImplementedError(f"{self.type_name()} has no learned thresholds")

    def tracked_threshold(self) -> Tensor | None:
        """The one threshold (a scalar) that eval mode applies to what is ranked; None: it has none, or none yet."""
        return None

    def cutoffs_L(self, n_L: Tensor | None = None) -> Tensor | None:
        """`theta_L`, not negative, with which eval mode gives `h * 1[h > theta]`; None: what is kept depends on other latents.
        A latent that never fires has `NEVER`.

        Raises:
            InputError: it was never trained.
        """
        return None

    def ranked_cutoff(self) -> Tensor | None:
        """The one threshold (a scalar) above which eval mode keeps what it ranks; None: there is none."""
        return None

    def set_cutoffs_(self, theta: Tensor) -> None:
        """Make eval mode give `h * 1[h > theta]`, for a `theta_L`; where latents are ranked, for the one value of what is
        ranked."""
        raise NotImplementedError(f"{self.type_name()} has no thresholds")

    def rescale_latents_(self, scale_L: Tensor) -> None:
        """Called when pre-activations are multiplied by `scale_L`: adapt, so that the same latents are active.

        Raises:
            InputError: which latents are kept depends on their scale.
        """
        raise InputError(
            f"{self.section}.type = {self.type_name()!r}: which latents are kept depends on their scale, "
            "so decoder norms cannot be folded into the encoder"
        )

    # ---- copies

    def for_prefix(self, n_latents: int, threshold: Tensor | None) -> ActivationFunction:
        """What keeps, of the first `n_latents` alone, what this one keeps of them, in eval mode.

        Args:
            threshold: a scalar, for activations that keep k latents of each token or batch: from which rank on it keeps them;
                None: not known.

        Raises:
            InputError: what is kept depends on the other latents.
        """
        raise InputError(
            f"prefix: {self.type_name()!r} keeps latents by what the others are: no prefix of it stands alone"
        )

    def for_n_latents(self, n_latents: int, selects_from: int | None = None) -> Self:
        """A fresh activation of the same config for another number of latents, which are a share of the `selects_from`
        that a selection is made from."""
        return self.of(self.config, n_latents=n_latents, selects_from=selects_from)

    def to_param_dtype(self, dtype: torch.dtype) -> Self:
        """Thresholds in the model's dtype, but float32 where that is narrower; statistics keep their own."""
        for param in self.parameters():
            param.data = param.data.to(torch.promote_types(dtype, torch.float32))
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Whatever a model is cast to (`model.bfloat16()`), thresholds and statistics stay float32."""

        def wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(wide, recurse)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.config.model_dump().items() if k != "type")


ACTIVATIONS: Registry[Any] = Registry("crosscoder.activation", __package__ or "")
