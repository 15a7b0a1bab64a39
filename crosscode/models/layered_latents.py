"""Latents of several source layers as the latents of one dictionary, and back; those of a batch from its parts.

The latents of layer s have the ids `s * L` to `(s + 1) * L - 1`.

Axes: B tokens · L latents of one layer · S source layers · N stored entries of a sparse batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from crosscode_kernels.sparse import DenseLatents, Latents, SparseLatents
from torch import Tensor

from crosscode.models.activations.topk import topk_mask_BL


def concat_latents(layers: Sequence[Latents]) -> Latents:
    """One batch of latents with `S * L` latents. Differentiable; no host sync."""
    if len(layers) == 1:
        return layers[0]
    for layer in layers:  # an encoder may choose either form by the density of its layer
        if isinstance(layer, DenseLatents):
            return layer.beside(layers)
    sparse = [_sparse(layer) for layer in layers]
    value_N = torch.cat([layer.value_N for layer in sparse])
    source_N = _source_of_entry_N(sparse)
    id_N = torch.cat([layer.latent_idx_N + s * layer.n_latents for s, layer in enumerate(sparse)])
    row_ptr_B1 = torch.stack([layer.row_ptr_B1 for layer in sparse]).sum(0).to(torch.int32)
    n_latents, padded = sum(layer.n_latents for layer in sparse), all(layer.padded for layer in sparse)
    return SparseLatents(row_ptr_B1, id_N[source_N], value_N[source_N], n_latents, padded=padded)


def concat_tokens(parts: Sequence[Latents]) -> Latents:
    """The latents of a batch from those of its parts, detached."""
    if len(parts) == 1:
        return parts[0]
    for part in parts:
        if isinstance(part, DenseLatents):
            return part.above(parts)
    sparse = [part for part in parts if isinstance(part, SparseLatents)]
    offsets, n_entries = [sparse[0].row_ptr_B1[:1]], 0
    for part in sparse:
        offsets.append(part.row_ptr_B1[1:] + n_entries)
        n_entries += part.value_N.shape[0]
    return replace(
        sparse[0],
        row_ptr_B1=torch.cat(offsets),
        latent_idx_N=torch.cat([part.latent_idx_N for part in sparse]),
        value_N=torch.cat([part.value_N.detach() for part in sparse]),
        by_latent=None,
        deficit_L=None,
        preacts_N=None,
    )


def layer_of_latents(latents: Latents, layer: int, n_layers: int) -> Latents:
    """The latents of one source layer. Entries of other layers stay stored, with value 0."""
    n_latents = latents.n_latents // n_layers
    return latents.slice_latents(layer * n_latents, (layer + 1) * n_latents)


def keep_largest(layers: Sequence[Latents], k: int, scale_L: Tensor | None, *, over_batch: bool) -> list[Latents]:
    """Of the latents of all layers, only the k largest of each token (or `k * B` largest of the batch), others 0.

    Exact where each layer brings at least its own k largest (`k * B` largest). Ties: the lowest id wins.

    Args:
        scale_L: by what latents are multiplied for the ranking, over all layers; None: 1.
    """
    with torch.no_grad():
        joined = concat_latents(layers)
    n_rows = 1 if over_batch else joined.batch_size
    n_kept = k * joined.batch_size if over_batch else k
    if isinstance(joined, DenseLatents):
        rank_BL = joined.value_BL if scale_L is None else joined.value_BL * scale_L
        keep_BL = topk_mask_BL(rank_BL.reshape(n_rows, -1), n_kept).reshape(rank_BL.shape)
        masks = keep_BL.chunk(len(layers), dim=1)
        return [DenseLatents(layer.to_dense() * mask_BL) for layer, mask_BL in zip(layers, masks, strict=True)]
    rank_N = joined.value_N if scale_L is None else joined.value_N * scale_L[joined.latent_idx_N.long()]
    # Every token has the same number of stored entries here, as each layer stores one number of them for all, in any order.
    # What is stable must begin in the order of ids.
    n_stored = rank_N.shape[0] // max(n_rows, 1)
    flat_RN = (joined.token_idx_N() * joined.n_latents + joined.latent_idx_N.long()).reshape(n_rows, n_stored)
    order_RN = flat_RN.argsort(dim=1)
    keep_RN = topk_mask_BL(rank_N.reshape(n_rows, n_stored).gather(1, order_RN), min(n_kept, n_stored))
    keep_N = torch.empty_like(keep_RN).scatter(1, order_RN, keep_RN).flatten()
    sparse = [_sparse(layer) for layer in layers]
    keep_of_entry_N = torch.empty_like(keep_N).scatter(0, _source_of_entry_N(sparse), keep_N)
    masks = keep_of_entry_N.split([layer.value_N.shape[0] for layer in sparse])
    # What is not kept is padding from here on: it leaves the order by latent.
    return [
        replace(layer, value_N=layer.value_N * mask_N, by_latent=None, padded=True)
        for layer, mask_N in zip(sparse, masks, strict=True)
    ]


def _source_of_entry_N(layers: Sequence[SparseLatents]) -> Tensor:
    """For each entry of the joined batch (token by token, layer by layer) its place in the concatenated entries."""
    counts_SB = torch.stack([layer.row_ptr_B1.diff().long() for layer in layers])
    n_entries = sum(layer.value_N.shape[0] for layer in layers)
    counts_BS = counts_SB.T
    start_BS = counts_BS.flatten().cumsum(0).reshape(counts_BS.shape) - counts_BS
    destinations = []
    for s, layer in enumerate(layers):
        token_N = layer.token_idx_N()
        within_N = torch.arange(layer.value_N.shape[0], device=token_N.device) - layer.row_ptr_B1.long()[token_N]
        destinations.append(start_BS[token_N, s] + within_N)
    destination_N = torch.cat(destinations)
    order_N = torch.arange(n_entries, device=destination_N.device)
    return torch.empty_like(destination_N).scatter(0, destination_N, order_N)


def _sparse(latents: Latents) -> SparseLatents:
    if not isinstance(latents, SparseLatents):
        raise TypeError("selection over layers needs latents in one form")
    return latents
