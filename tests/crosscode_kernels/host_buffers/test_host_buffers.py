"""Memory of large CPU tensors that is used again, and never while somebody uses it.

Axes: B tokens · I flattened input dims · L latents.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from crosscode_kernels import host_buffers, resolve_backend
from crosscode_kernels.host_buffers import HostBuffers
from crosscode_kernels.segments import torch_impl
from crosscode_kernels.sparse import SparseLatents

LARGE = (3, 1 << 19)
STEP = """
import resource, sys, torch
from crosscode_kernels import resolve_backend
torch.manual_seed(0)
ops, (B, I, L) = resolve_backend("torch", "cpu"), (256, 512, 8192)
x_BI, W_enc_LI = torch.randn(B, I), torch.randn(L, I, requires_grad=True)
W_dec_LO, b_enc_L = torch.randn(L, I, requires_grad=True), torch.zeros(L, requires_grad=True)
def step():
    W_enc_LI.grad = W_dec_LO.grad = b_enc_L.grad = None
    latents = ops.encode_topk(x_BI, W_enc_LI, b_enc_L, 8)
    ops.decode_recon_loss(latents, W_dec_LO, None, x_BI, (I,)).loss.backward()
def new_pages(n_steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n_steps): step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(new_pages(3), new_pages(10))
"""


def test_memory_is_handed_out_again_once_no_tensor_uses_it():
    buffers = HostBuffers()
    first = buffers.empty(LARGE, torch.float32)
    address = first.data_ptr()
    del first
    assert buffers.empty(LARGE, torch.float32).data_ptr() == address
    assert buffers.empty((LARGE[1], LARGE[0]), torch.int32).data_ptr() == address
    assert buffers.n_bytes() == 6 << 20


@pytest.mark.parametrize(
    "held", [lambda t: t[1, 5:], lambda t: t.T, lambda t: t.untyped_storage(), lambda t: t.numpy(), memoryview]
)
def test_a_view_keeps_the_memory(held):
    buffers = HostBuffers()
    tensor = buffers.empty(LARGE, torch.float32)
    address = tensor.data_ptr()
    kept = held(tensor.numpy() if held is memoryview else tensor)
    del tensor
    other = buffers.empty(LARGE, torch.float32)
    assert other.data_ptr() != address
    del kept
    assert buffers.empty(LARGE, torch.float32).data_ptr() == address


def test_tensors_saved_for_backward_keep_the_memory():
    buffers = HostBuffers()
    leaf = torch.ones(LARGE, requires_grad=True)
    factor = buffers.empty(LARGE, torch.float32).fill_(3)
    loss = (leaf * factor).sum()
    del factor
    buffers.empty(LARGE, torch.float32).fill_(7)
    loss.backward()
    assert leaf.grad is not None and bool((leaf.grad == 3).all())


def test_blocks_that_nothing_asks_for_are_given_up():
    buffers = HostBuffers()
    kept = buffers.empty(LARGE, torch.float64).fill_(1)
    buffers.empty(LARGE, torch.float32)
    for _ in range(100):
        buffers.empty(LARGE, torch.uint8)
    assert buffers.n_bytes() == (12 << 20) + (3 << 19)
    assert bool((kept == 1).all())
    buffers.clear()
    assert buffers.n_bytes() == 0 and bool((kept == 1).all())


def test_threads_never_share_memory():
    buffers = HostBuffers()

    def use(number: int) -> bool:
        right = True
        for _ in range(20):
            tensor = buffers.empty(LARGE, torch.int32).fill_(number)
            right &= bool((tensor == number).all())
        return right

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(use, range(8)))


def test_small_tensors_stay_with_the_c_library():
    host_buffers.clear()
    like = torch.zeros(1)
    assert host_buffers.empty((10, 10), like).shape == (10, 10)
    assert host_buffers.empty((0, 10), like).shape == (0, 10)
    assert host_buffers._buffers.n_bytes() == 0
    assert host_buffers.empty(LARGE, like, torch.bool).dtype == torch.bool


def test_gradients_of_earlier_steps_keep_their_values():
    torch.manual_seed(0)
    ops, x_BI = resolve_backend("torch", "cpu"), torch.randn(8, 512)
    W_enc_LI, W_dec_LI = (torch.randn(4096, 512, requires_grad=True) for _ in range(2))
    kept, copies = [], []
    for i in range(3):
        W_enc_LI.grad = W_dec_LI.grad = None
        latents = ops.encode_topk(x_BI + i, W_enc_LI, None, 4)
        ops.decode_recon_loss(latents, W_dec_LI, None, x_BI, (512,)).loss.backward()
        kept += [W_enc_LI.grad, W_dec_LI.grad]
        copies += [W_enc_LI.grad.clone(), W_dec_LI.grad.clone()]
    assert all(torch.equal(one, other) for one, other in zip(kept, copies, strict=True))
    assert not torch.equal(kept[0], kept[2])


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
def test_a_step_needs_no_new_pages_once_it_has_run():
    """Pre-activations and both gradients are 6144 pages a step where their memory goes back to the system."""
    result = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, check=True)
    first, later = map(int, result.stdout.split())
    assert first > 6144
    assert later < 6144


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_products_and_embedding_bags_give_the_same_sums(monkeypatch, dtype):
    torch.manual_seed(0)
    n_rows, n_sums, n_entries = 40, 200, 900
    ptr_G1 = torch.cat([torch.zeros(1), torch.randint(0, n_entries, (n_sums - 1,)).sort().values]).int()
    ptr_G1 = torch.cat([ptr_G1, torch.tensor([n_entries], dtype=torch.int32)])
    row_idx_N = torch.randint(0, n_rows, (n_entries,), dtype=torch.int32)
    weight_N, rows = torch.randn(n_entries, dtype=dtype), torch.randn(n_rows, 24, dtype=dtype)
    found = {}
    for by_product in (True, False):
        monkeypatch.setattr(torch_impl, "_has_sparse_product", lambda on=by_product: on)
        found[by_product] = torch_impl.row_sums(ptr_G1, row_idx_N, weight_N, rows)
    oracle = torch.zeros(n_sums, 24, dtype=torch.float64)
    sum_N = torch.repeat_interleave(torch.arange(n_sums), ptr_G1.diff().long())
    oracle.index_add_(0, sum_N, weight_N.double().unsqueeze(1) * rows.double()[row_idx_N.long()])
    for sums in found.values():
        torch.testing.assert_close(sums.double(), oracle, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("way", ["sparse product", "bags", "all"])
def test_dots_of_pairs_are_those_of_the_formula_in_either_order(monkeypatch, dtype, way):
    monkeypatch.setattr(torch_impl, "_has_sparse_product", lambda: way == "sparse product")
    monkeypatch.setattr(torch_impl, "_MANY_PAIRS", 0.1 if way == "all" else 1.0)
    torch.manual_seed(0)
    latent_idx_BK = torch.rand(6, 9).topk(4).indices.int()
    value_BK = torch.rand(6, 4, dtype=dtype)
    value_BK[2:4, 3] = 0  # padding, behind the last latent
    rows_BO, W_LO = torch.randn(6, 33).to(dtype), torch.randn(9, 33).to(dtype)
    latents = replace(SparseLatents.from_topk(latent_idx_BK, value_BK, 9), padded=True)
    expected_BK = (rows_BO.double()[:, None] * W_LO.double()[latent_idx_BK.long()]).sum(2)
    by_token, by_latent = (
        torch_impl.pair_dots(latents.entries(order), rows_BO, W_LO) for order in (None, latents.transpose())
    )
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(by_token.view(6, 4).double(), expected_BK, **tolerance)
    torch.testing.assert_close(by_latent.view(6, 4).double(), expected_BK * (value_BK != 0), **tolerance)


def test_rows_of_entries_that_are_mostly_zero_are_not_read():
    """The window of a JumpReLU: stored, not active. A NaN in their rows would show."""
    torch.manual_seed(0)
    value_BK, latent_idx_BK = torch.rand(8, 6), torch.rand(8, 12).topk(6).indices.int()
    value_BK[latent_idx_BK > 3] = 0
    value_BK[0] = 0
    assert 2 * value_BK.count_nonzero() < value_BK.numel()
    W_LO = torch.randn(12, 5)
    W_LO[4:] = torch.nan
    entries = SparseLatents.from_topk(latent_idx_BK, value_BK, 12).entries(None)
    found_BO = torch_impl.token_sums(entries, W_LO)
    expected_BO = (value_BK.double()[:, :, None] * W_LO.nan_to_num().double()[latent_idx_BK.long()]).sum(1)
    torch.testing.assert_close(found_BO.double(), expected_BO, rtol=1e-5, atol=1e-6)


def test_a_nan_reaches_only_the_sums_that_read_it():
    """Kept memory holds old values, NaN among them: a sum without entries is 0 all the same."""
    rows = torch.ones(3, 1 << 18)
    rows[1] = float("nan")
    for _ in range(2):
        ptr_G1, row_idx_N = torch.tensor([0, 1, 1, 2, 3, 3, 3], dtype=torch.int32), torch.tensor([0, 1, 2]).int()
        sums = torch_impl.row_sums(ptr_G1, row_idx_N, torch.ones(3), rows)
        assert sums[:, 0].isnan().tolist() == [False, False, True, False, False, False]
        assert sums.nan_to_num(0).sum(1).tolist() == [1 << 18, 0, 0, 1 << 18, 0, 0]
        del sums


def test_free_blocks_go_back_where_memory_gets_short(monkeypatch):
    buffers = HostBuffers()
    used = buffers.empty(LARGE, torch.float32)
    buffers.empty((5, 1 << 19), torch.float32)
    assert buffers.n_bytes() == 16 << 20
    monkeypatch.setattr(host_buffers, "available_bytes", lambda: 1 << 20)
    other = buffers.empty((4, 1 << 19), torch.float32)
    assert buffers.n_bytes() == 14 << 20 and used.data_ptr() != other.data_ptr()


def test_free_blocks_go_back_where_the_system_refuses_a_new_one(monkeypatch):
    buffers = HostBuffers()
    buffers.empty(LARGE, torch.float32)
    make, refusals = torch.empty, iter([True, False])

    def refused_once(*args, **kwargs):
        if next(refusals):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return make(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", refused_once)
    buffers.empty((4, 1 << 19), torch.float32)
    assert buffers.n_bytes() == 8 << 20


def test_the_system_says_what_it_can_give():
    assert host_buffers.available_bytes() > 1 << 20
