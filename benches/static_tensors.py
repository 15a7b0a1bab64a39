"""Real sizes, and the tensors of one: random numbers, or none on the `meta` device.

Axes: B tokens · I flattened input dims · O flattened output dims · L latents · X crosscoding positions
N stored entries · k entries per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from crosscode_kernels.registration import kernel_of
from crosscode_kernels.sparse import Entries
from torch import Tensor


class Case(NamedTuple):
    """A model and batch size; `segments` are the widths of the output positions."""

    name: str
    n_tokens: int
    input_width: int
    segments: tuple[int, ...]
    n_latents: int
    k: int

    @property
    def output_width(self) -> int:
        return sum(self.segments)


CASES = (
    Case("crosscoder-131k", 4096, 4608, (2304, 2304), 131072, 64),
    Case("crosscoder-16k", 4096, 4608, (2304, 2304), 16384, 64),
    Case("cpu-bench", 1024, 1536, (768, 768), 16384, 32),
    Case("cross-layer-8k", 1024, 512, (512,) * 6, 8192, 32),
    Case("sae-24k", 8192, 768, (768,), 24576, 32),
    Case("sae-65k-1M", 2048, 2304, (2304,), 1048576, 128),
    Case("ragged", 1000, 1001, (333, 668), 5003, 17),
)
N_PREFIXES = 5
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Tensors:
    """The tensors of one case: random numbers, or none at all on the meta device."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str = "meta", seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            if device == "meta":
                return torch.empty(shape, dtype=dtype, device=device)
            return torch.randn(shape, generator=generator).to(device, dtype)

        def positive(*shape: int) -> Tensor:
            return normal(*shape, dtype=torch.float32).abs_().add_(0.1)

        n_tokens, n_latents, width = case.n_tokens, case.n_latents, case.output_width
        self.segments = list(case.segments)
        self.x_BI = normal(n_tokens, case.input_width)
        self.W_enc_LI = normal(n_latents, case.input_width)
        self.b_enc_L = normal(n_latents)
        self.W_dec_LO = normal(n_latents, width)
        self.b_dec_O = normal(width)
        self.y_BO = normal(n_tokens, width)
        self.target_BO = normal(n_tokens, width)
        self.h_BL = normal(n_tokens, n_latents)
        self.da_BL = normal(n_tokens, n_latents)
        self.dead_L = normal(n_latents) > 0
        self.t_L, self.n_L, self.lambda_L = (positive(n_latents) for _ in range(3))
        self.norms_LX = positive(n_latents, len(case.segments))
        self.g_X = positive(len(case.segments))
        self.g = positive()
        self.row_ptr_B1 = torch.arange(n_tokens + 1, dtype=torch.int32, device=device) * case.k
        self.idx_N = self._zipf_indices(case, device, generator)
        self.value_N = normal(n_tokens * case.k).abs_()
        n_grouped = sum(width * (x + 1) for x, width in enumerate(case.segments))
        self.W_groups = normal(n_latents * n_grouped)
        self.order = kernel_of("latent_order", "triton")(self.idx_N, n_latents)

    @property
    def entries(self) -> Entries:
        return Entries(self.row_ptr_B1, self.idx_N, self.value_N, *self.order)

    def in_segments(self, entries: Entries) -> Entries:
        """The same, each token as `N_PREFIXES` of them: its first entry in the second, the others in the last."""
        k = self.idx_N.shape[0] // self.x_BI.shape[0]
        ends_S = torch.tensor([0] + [1] * (N_PREFIXES - 2) + [k], dtype=torch.int32, device=entries.row_ptr_B1.device)
        ends_BS = entries.row_ptr_B1[:-1, None] + ends_S
        return entries._replace(row_ptr_B1=torch.cat([entries.row_ptr_B1[:1], ends_BS.flatten()]))

    @staticmethod
    def _zipf_indices(case: Case, device: str, generator: torch.Generator) -> Tensor:
        """k distinct latents for each token, ascending; popularity as in a trained model, latent 0 on every token
        and the last one at the very end."""
        shape = (case.n_tokens, case.k)
        if device == "meta":
            return torch.empty(shape, dtype=torch.int32, device=device).view(-1)
        idx_BK = torch.zeros(shape, dtype=torch.int64)
        if case.k > 1:
            weight_L = 1 / (1 + torch.arange(case.n_latents - 1).float())
            others_BK = torch.multinomial(weight_L.expand(case.n_tokens, -1), case.k - 1, generator=generator)
            idx_BK[:, 1:] = 1 + others_BK.sort(1).values
            idx_BK[-1, -1] = case.n_latents - 1
        return idx_BK.int().to(device).view(-1)
