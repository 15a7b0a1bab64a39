"""Among equal latents of several layers the lowest global index is kept, by every backend and in every dtype."""

import pytest
import torch
from crosscode_kernels.sparse import SparseLatents

from crosscode.models import ACTIVATIONS, CompoundCrossLayerTranscoder
from crosscode.models.layered_latents import concat_latents, keep_largest

N_LAYERS, L_LAYER, D = 3, 64, 64


def model_with_ties(activation, backend, dtype):
    """Pre-activations are small integers, so that most of them are equal to others, exactly."""
    pattern = ACTIVATIONS[activation](k=10, n_latents=N_LAYERS * L_LAYER)
    model = CompoundCrossLayerTranscoder(
        N_LAYERS, D, D, N_LAYERS * L_LAYER, pattern, topk_scope="all_layers", backend=backend, dtype=dtype
    )
    with torch.no_grad():
        for part in model.parts:
            part.W_enc_LXiDi.copy_(torch.eye(L_LAYER))
            part.W_dec_LXoDo.copy_(torch.randn(part.W_dec_LXoDo.shape))
            part.b_enc_L.zero_()
        model.b_dec_XoDo.zero_()
    return model.train()


def first_of_equals(value_BL, k, *, over_batch):
    rows = value_BL.reshape(1, -1).tolist() if over_batch else value_BL.tolist()
    kept = torch.zeros_like(value_BL).reshape(len(rows), -1)
    for b, row in enumerate(rows):
        for i in sorted(range(len(row)), key=lambda i: (-row[i], i))[: k * (value_BL.shape[0] if over_batch else 1)]:
            kept[b, i] = row[i]
    return kept.reshape(value_BL.shape)


def integers(n_tokens=20):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 4, (n_tokens, N_LAYERS, D), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_the_lowest_index_of_all_layers_wins(activation, backend, dtype):
    model, x = model_with_ties(activation, backend, dtype), integers()
    found_BL = model.encode(x.to(dtype)).double()
    expected_BL = first_of_equals(x.flatten(1).double(), 10, over_batch=activation == "batch_topk")
    assert torch.equal(found_BL, expected_BL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_and_so_it_does_among_dead_latents(backend, dtype):
    model, x = model_with_ties("topk", backend, dtype), integers()
    dead_L = torch.rand(N_LAYERS * L_LAYER, generator=torch.Generator().manual_seed(1)) < 0.7
    latents_BL = first_of_equals(x.flatten(1).double() * dead_L, 5, over_batch=False)
    with torch.no_grad():
        expected_BO = model.decode(latents_BL.to(dtype)).flatten(1)
    left = model.dead_recon_loss(x.to(dtype), dead_L, 5, -expected_BO)
    assert left < (1e-4 if dtype == torch.bfloat16 else 1e-10) * expected_BO.square().sum(1).mean()


@pytest.mark.parametrize("over_batch", [True, False])
def test_whatever_the_order_in_which_an_encoder_stores_equal_entries(over_batch):
    layers = [
        SparseLatents.from_topk(
            torch.tensor([[3, 1, 2], [2, 3, 0]]), torch.tensor([[2.0, 2.0, 2.0], [2.0, 2.0, 1.0]]), 4
        ),
        SparseLatents.from_topk(
            torch.tensor([[2, 0, 1], [3, 0, 1]]), torch.tensor([[3.0, 2.0, 2.0], [2.0, 2.0, 2.0]]), 4
        ),
    ]
    dense_BL = concat_latents(layers).to_dense()
    kept_BL = concat_latents(keep_largest(layers, 3, None, over_batch=over_batch)).to_dense()
    assert torch.equal(kept_BL, first_of_equals(dense_BL, 3, over_batch=over_batch))
