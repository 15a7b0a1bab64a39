"""recon_loss: squared reconstruction error, summed over the output, mean over the batch.

Axes: B tokens · O flattened output dims · X crosscoding positions.

    per_x[x] = (1 / B) sum over b and over o in segment x of (y_bo - target_bo)^2;  loss = sum of per_x

Shapes: y_BO, target_BO, segments (widths along O) -> loss scalar, per_x_X, both float32 (float64 for float64); an
empty batch gives 0.
Gradients: `2 (y - target) / B` to y, its negative to target, through `loss` and through `per_x_X`.
Errors (ValueError): shapes that differ, mixed dtypes or devices, segments that are not positive or do not sum to O.
"""

from collections.abc import Sequence

from torch import Tensor

from crosscode_kernels.checks import check_dims, check_float, check_segments


def check(y_BO: Tensor, target_BO: Tensor, segments: Sequence[int]) -> None:
    check_dims("recon_loss", "y_BO", y_BO, 2)
    if y_BO.shape != target_BO.shape:
        raise ValueError(
            f"recon_loss: y_BO has shape {tuple(y_BO.shape)} and target_BO {tuple(target_BO.shape)}; must be equal"
        )
    check_float("recon_loss", y_BO=y_BO, target_BO=target_BO)
    check_segments("recon_loss", "y_BO", y_BO.shape[1], segments)


def check_target(batch_size: int, W_dec_LO: Tensor, target_BO: Tensor, segments: Sequence[int]) -> None:
    """For an output that is never made: the target alone is checked against what it would have been."""
    expected = (batch_size, W_dec_LO.shape[1])
    if tuple(target_BO.shape) != expected:
        raise ValueError(f"recon_loss: target_BO has shape {tuple(target_BO.shape)}; must be {expected}")
    check_float("recon_loss", target_BO=target_BO, W_dec_LO=W_dec_LO)
    check_segments("recon_loss", "target_BO", target_BO.shape[1], segments)
