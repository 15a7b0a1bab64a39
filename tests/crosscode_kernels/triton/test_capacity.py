"""ReLU and JumpReLU whose entries lie in buffers of a fixed size: values and gradients are those of dense products in float64,
whether a batch fits or not.

Axes: B tokens · I, O flattened input and output dims · L latents.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from crosscode_kernels import Backend, OpSet
from crosscode_kernels.capacity import Capacity
from crosscode_kernels.capacity.triton_impl import product_if
from crosscode_kernels.triton_common.launch import recorded_launches
from torch import Tensor
from triton_interpreter import repaired_interpreter

B, I, O, L, EPS = 7, 19, 22, 83, 0.4  # noqa: E741
SHARES = {"fits": 0.4, "overflows": 0.01}


@pytest.fixture(autouse=True)
def _interpreter():
    with repaired_interpreter():
        yield


def leaves(dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """x, W_enc, b_enc, log thresholds, W_dec, b_dec. About a tenth is active; one latent always, one never."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, I), (L, I), (L,), (L,), (L, O), (O,))
    x, W_enc, b_enc, t, W_dec, b_dec = (torch.randn(shape, generator=generator) for shape in shapes)
    b_enc = b_enc - 1.3
    b_enc[0], b_enc[1], t = 9.0, -99.0, 0.3 * t - 0.5
    tensors = (x, W_enc * I**-0.5, b_enc, t, W_dec, b_dec)
    return [tensor.to(device, dtype).requires_grad_() for tensor in tensors]


def step(ops: OpSet, tensors: list[Tensor], kind: str) -> tuple[Any, list[Tensor]]:
    """The latents; the loss and all gradients."""
    x, W_enc, b_enc, t, W_dec, b_dec = tensors
    n_L, lambda_L = (torch.linspace(start, 1, L, dtype=x.dtype, device=x.device) for start in (0.5, 2))
    encode, *options = (ops.encode_relu,) if kind == "relu" else (ops.encode_jumprelu, t, EPS, "gdm")
    latents = encode(x, W_enc, b_enc, *options)
    target = torch.ones(x.shape[0], O, dtype=x.dtype, device=x.device)
    loss = ops.decode_recon_loss(latents, W_dec, b_dec, target, [O]).loss + ops.weighted_l1(latents, n_L, lambda_L)
    if kind == "jumprelu with deficit":
        loss = loss + ops.pre_act_penalty(latents, t, n_L, lambda_L)
    used = [tensor for tensor in tensors if kind != "relu" or tensor is not t]
    return latents, [loss, *torch.autograd.grad(loss, used)]


def ops_with(share: float) -> OpSet:
    return OpSet(Backend("triton", capacity=share))


@pytest.mark.parametrize("case", SHARES)
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "jumprelu with deficit"])
def test_values_and_gradients_are_those_of_float64(kind, case):
    latents, found = step(ops_with(SHARES[case]), leaves(torch.float32), kind)
    oracle, wanted = step(OpSet(Backend("reference")), leaves(torch.float64), kind)
    assert isinstance(latents.active, Capacity) and latents.active.overflows == (case == "overflows")
    assert (latents.active.entries.latent_ptr_L1[-1] > 0) == (case == "fits")
    assert torch.equal(latents.to_dense() > 0, oracle.to_dense() > 0)
    for one, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("case", SHARES)
def test_in_bfloat16_it_is_as_right_as_dense_products(case):
    def distances(share: float) -> list[float]:
        _, found = step(ops_with(share), leaves(torch.bfloat16), "jumprelu")
        return [float((one.double() - exact).norm() / exact.norm()) for one, exact in zip(found, wanted, strict=True)]

    rounded = [tensor.double().detach().requires_grad_() for tensor in leaves(torch.bfloat16)]
    wanted = step(OpSet(Backend("reference")), rounded, "jumprelu")[1]
    for own, dense in zip(distances(SHARES[case]), distances(0.0), strict=True):
        assert own < 2 * dense + 2**-8


def test_the_entries_are_the_active_and_the_window_in_order_and_the_last_that_fits_does():
    generator = torch.Generator().manual_seed(1)
    h_BL = torch.randn(5, 70, generator=generator)
    h_BL[2] = -1.0
    h_BL[3, 4] = float("nan")
    least_L = torch.linspace(-0.2, 1, 70)
    wanted_BL = ~(h_BL <= least_L)
    n = int(wanted_BL.sum())
    for n_entries in (n, n + 3, n - 1):
        found = Capacity.of(h_BL, h_BL, least_L, (n_entries - 0.5) / h_BL.numel())
        assert found.place_N.shape == (n_entries,) and found.overflows == (n_entries < n)
        kept = n if n_entries >= n else 0
        assert found.entries.row_ptr_B1[-1] == found.entries.latent_ptr_L1[-1] == kept
        assert torch.equal(found.place_N[:kept], wanted_BL.view(-1).nonzero().view(-1)[:kept])
        assert (found.place_N[kept:] == h_BL.numel()).all() and not found.entries.value_N[kept:].any()
        torch.testing.assert_close(found.entries.value_N[:kept], h_BL[wanted_BL][:kept], rtol=0, atol=0, equal_nan=True)
        back_BL = found.scattered(found.gathered(h_BL), h_BL)
        torch.testing.assert_close(back_BL, h_BL.where(wanted_BL & (kept > 0), 0), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("left_t", "right_t"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_product_is_made_where_the_flag_is_set_alone(left_t, right_t):
    generator = torch.Generator().manual_seed(2)
    left, right = torch.randn(70, 45, generator=generator), torch.randn(45, 66, generator=generator)
    mask, bias = torch.randn(70, 45, generator=generator), torch.randn(66, generator=generator)
    given = [part.T.contiguous().T if turned else part for part, turned in ((left, left_t), (right, right_t))]
    mask_as_left = mask.T.contiguous() if left_t else mask
    out = torch.full((70, 66), 7.0)
    product_if(torch.zeros((), dtype=torch.int32), *given, out, mask=mask_as_left, bias=bias)
    assert (out == 7).all()
    product_if(torch.ones((), dtype=torch.int32), *given, out, mask=mask_as_left, bias=bias)
    wanted = left.double().where(mask > 0, 0) @ right.double() + bias
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["relu", "jumprelu with deficit"])
def test_nothing_waits_for_the_device(kind):
    """On tensors without content whatever reads one raises; both ways are launched."""
    with recorded_launches() as launches:
        step(ops_with(0.4), leaves(torch.float32, "meta"), kind)
    names = [launch.kernel.__name__ for launch in launches]
    assert names.count("_support_kernel") == 2 and names.count("_product_if_kernel") >= 5


def test_other_values_have_no_entries_and_no_tokens_are_no_batch():
    tensors = leaves(torch.float32)
    latents = ops_with(0.4).encode_relu(*tensors[:3])
    other = latents.with_value(2 * latents.value)
    y = ops_with(0.4).sparse_decode(other, tensors[4])
    torch.testing.assert_close(y, 2 * latents.value @ tensors[4], rtol=1e-5, atol=1e-4)
    assert ops_with(0.4).encode_relu(tensors[0][:0], *tensors[1:3]).active is None
