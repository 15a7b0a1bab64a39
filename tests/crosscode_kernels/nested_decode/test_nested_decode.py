"""Each prefix of a dictionary decodes alone, in one pass.

Axes: B tokens · S prefixes · O flattened output dims · L latents.
"""

from __future__ import annotations

import pytest
import torch
from crosscode_kernels import DenseLatents, resolve_backend

L, K = 70, 6


def latents_of(ops, kind, p):
    encoder = (p.x_BI, p.W_enc_LI, p.b_enc_L)
    if kind == "topk":
        return ops.encode_topk(*encoder, K)
    if kind == "batch_topk":
        return ops.encode_batch_topk(*encoder, K)
    return ops.encode_relu(*encoder) if kind == "relu" else ops.encode_jumprelu(*encoder, p.t_L, 0.5, "gdm")


@pytest.mark.parametrize("kind", ["topk", "batch_topk", "relu", "jumprelu"])
@pytest.mark.parametrize("sizes", [(1, 8, 9, 40), (5, 64, L), (L,), (3,)])
def test_every_prefix_is_a_decode_of_its_own(kind, sizes, backend, make_problem):
    p, q = (make_problem(33, 12, L, 9, segments=(4, 5), device=backend.device) for _ in range(2))
    latents = latents_of(backend.ops, kind, p)
    y_BSO = backend.ops.nested_decode(latents, p.W_dec_LO, p.b_dec_O, sizes)
    value_BL = latents_of(resolve_backend("reference", "cpu"), kind, q).to_dense()
    expected = torch.stack(
        [(value_BL * (torch.arange(L, device=value_BL.device) < size)) @ q.W_dec_LO + q.b_dec_O for size in sizes], 1
    )
    torch.testing.assert_close(y_BSO, expected, rtol=1e-4, atol=1e-4)
    weight = torch.linspace(-1, 1, y_BSO.numel(), device=y_BSO.device).view(y_BSO.shape)
    for y in (y_BSO, expected):
        (y * weight).sum().backward()
    for name in ("x_BI", "W_enc_LI", "b_enc_L", "W_dec_LO", "b_dec_O", *(["t_L"] if kind == "jumprelu" else [])):
        ours, theirs = getattr(p, name).grad, getattr(q, name).grad
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("sizes", [(), (0, 3), (3, 3), (5, 3), (3, L + 1)])
def test_sizes_must_ascend_within_the_dictionary(sizes):
    latents = DenseLatents(torch.ones(2, L))
    with pytest.raises(ValueError, match=rf"nested_decode: sizes are .*; must ascend from at least 1 to at most {L}"):
        resolve_backend("torch", "cpu").nested_decode(latents, torch.ones(L, 3), None, sizes)
