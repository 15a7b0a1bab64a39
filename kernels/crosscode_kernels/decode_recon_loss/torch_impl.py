"""decode_recon in stock ops: the residual takes the place of the output.

Axes: O flattened output dims · L latents · B tokens · X crosscoding positions.
"""

from __future__ import annotations

from torch import Tensor

from crosscode_kernels.recon_loss.torch_impl import errors
from crosscode_kernels.sparse import Entries
from crosscode_kernels.sparse_decode.torch_impl import sparse_decode


def decode_recon(
    entries: Entries, W_LO: Tensor, b_O: Tensor | None, target_BO: Tensor, segments: list[int]
) -> tuple[Tensor, Tensor]:
    """`per_x_X, residual_BO`. The bits are those of `sparse_decode`: 0 where that equals the target."""
    return errors(sparse_decode(entries, W_LO, b_O).to(target_BO.dtype).sub_(target_BO), segments)
