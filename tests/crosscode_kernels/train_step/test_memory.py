"""What a step keeps for backward and how much it needs at its peak.

Axes: B tokens · I flattened input dims · O flattened output dims · L latents.
"""

from __future__ import annotations

import pytest
import torch
from crosscode_kernels import host_buffers, resolve_backend

B, I, L, K = 256, 96, 4096, 8  # noqa: E741


def saved_bytes(loss_of, parameters):
    """Bytes of the unique storages that autograd keeps, parameters excluded."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of().backward()
    return sum(storages.values())


@pytest.mark.parametrize("encoder", ["encode_topk", "encode_batch_topk", "encode_groupmax"])
def test_a_top_k_step_keeps_input_residual_and_16_bytes_a_latent(fast_backend, encoder, make_problem):
    p = make_problem(B, I, L, I, device=fast_backend.device)
    ops, x_BI = fast_backend.ops, p.x_BI.detach()
    parameters = (p.W_enc_LI, p.b_enc_L, p.W_dec_LO, p.b_dec_O)

    def loss_of():
        latents = getattr(ops, encoder)(x_BI, p.W_enc_LI, p.b_enc_L, K)
        y_BO = ops.sparse_decode(latents, p.W_dec_LO, p.b_dec_O)
        return ops.recon_loss(y_BO, x_BI, (I // 2, I // 2)).loss

    limit = 1.1 * (2 * B * I * 4 + 16 * B * K)
    assert saved_bytes(loss_of, parameters) <= limit
    assert limit < B * L * 4


def test_a_sparse_jumprelu_step_keeps_no_dense_latents(make_problem):
    p = make_problem(B, I, L, I)
    with torch.no_grad():
        p.b_enc_L.sub_(6)
    ops, x_BI = resolve_backend("torch", "cpu"), p.x_BI.detach()
    parameters = (p.W_enc_LI, p.b_enc_L, p.W_dec_LO, p.b_dec_O, p.t_L)

    def loss_of():
        latents = ops.encode_jumprelu(x_BI, p.W_enc_LI, p.b_enc_L, p.t_L, 0.5, "anthropic")
        n_L = ops.decoder_norms(p.W_dec_LO, (I,), "sum").n_L
        penalty = ops.weighted_tanh(latents, n_L, p.lambda_L, 4.0) + ops.pre_act_penalty(
            latents, p.t_L, n_L, p.lambda_L
        )
        return ops.recon_loss(ops.sparse_decode(latents, p.W_dec_LO, p.b_dec_O), x_BI, (I,)).loss + penalty

    assert saved_bytes(loss_of, parameters) < B * L * 4 / 2


def test_no_dense_matrix_beside_the_preactivations_is_made(make_problem):
    """One step's allocations of the size of B x L: the pre-activations, once."""
    p = make_problem(B, I, L, I)
    ops, x_BI = resolve_backend("torch", "cpu"), p.x_BI.detach()
    host_buffers.clear()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        latents = ops.encode_topk(x_BI, p.W_enc_LI, p.b_enc_L, K)
        ops.recon_loss(ops.sparse_decode(latents, p.W_dec_LO, p.b_dec_O), x_BI, (I,)).loss.backward()
    from torch._C._profiler import _EventType

    sizes, queue = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while queue:
        event = queue.pop()
        queue.extend(event.children)
        if event.tag == _EventType.Allocation and event.extra_fields.alloc_size > 0:
            sizes.append(event.extra_fields.alloc_size)
    assert sum(size >= B * L * 4 for size in sizes) == 1
