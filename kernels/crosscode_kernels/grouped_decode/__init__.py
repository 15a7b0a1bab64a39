"""grouped_decode: latents of several dictionaries (the source layers of a compound cross-layer transcoder) to one output.

Axes: B tokens · S dictionaries · O flattened output dims · L latents of each · W width of a dictionary's rows (they may differ).

    y_b[o] = sum over s and over the entries n of token b in dictionary s of a_n W_s[l_n, o - first_s]  (+ b_dec[o])

where a dictionary writes to a window of the output, columns `first_s` to `first_s + W_s`.
Shapes: Latents over L for each dictionary, W_S (each L x W_s), b_dec_O (or None), first_S -> y_BO.
Sparse latents are one op: of Triton one launch that writes the output once, and one (two, where a latent may be hot) for both
gradients (more, where partial sums of hot latents would take too much memory). Dense ones are a product each, added into its
window.
Gradients, dtypes and saved tensors: those of `sparse_decode` for each dictionary; sums run over the dictionaries in order.
Errors (ValueError): those of `sparse_decode`; lists of different lengths, other numbers of latents or tokens, windows that do
not lie within the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from crosscode_kernels.backend import AnyBackend, backend_for
from crosscode_kernels.encoder import autocast
from crosscode_kernels.grouped_decode import reference
from crosscode_kernels.grouped_decode.autograd import joined_decode, window_sums
from crosscode_kernels.opset import door
from crosscode_kernels.sparse import Latents, SparseLatents
from crosscode_kernels.sparse_decode import check_decoder, sparse_decode


@door
def grouped_decode(
    latents_S: Sequence[Latents],
    W_S: Sequence[Tensor],
    b_dec_O: Tensor | None,
    first_S: Sequence[int],
    n_out: int,
    *,
    backend: AnyBackend = "auto",
) -> Tensor:
    """`y_BO`, `n_out` columns wide: the sum of the decodes of all dictionaries, each into its window."""
    if not len(latents_S) == len(W_S) == len(first_S) > 0:
        raise ValueError(
            f"grouped_decode: {len(latents_S)} latents, {len(W_S)} weights and {len(first_S)} first columns; must be as "
            "many of each, and at least one"
        )
    backend = backend_for(backend, latents_S[0])
    sizes = {(latents.batch_size, latents.n_latents) for latents in latents_S}
    if len(sizes) > 1:
        raise ValueError(f"grouped_decode: latents are of (tokens, latents) {sorted(sizes)}; must be of one size")
    widths = [W_LO.shape[-1] for W_LO in W_S]
    for first, width in zip(first_S, widths, strict=True):
        if not 0 <= first <= first + width <= n_out:
            raise ValueError(
                f"grouped_decode: a window is {first} to {first + width}; must lie within the {n_out} columns"
            )
    if b_dec_O is not None and tuple(b_dec_O.shape) != (n_out,):
        raise ValueError(f"grouped_decode: b_dec_O has shape {tuple(b_dec_O.shape)}; must be ({n_out},)")
    *W_S, b_dec_O = autocast(backend, *W_S, b_dec_O)
    if backend.name == "reference":
        return reference.grouped_decode(latents_S, W_S, b_dec_O, first_S, n_out)
    sparse_S = [latents for latents in latents_S if isinstance(latents, SparseLatents)]
    if len(sparse_S) < len(W_S):  # an encoder may choose either form by the density of its latents
        y_SBO = [sparse_decode(*pair, backend=backend) for pair in zip(latents_S, W_S, strict=True)]
        return window_sums(y_SBO, b_dec_O, list(first_S), n_out)
    value_S = autocast(backend, *(latents.value_N for latents in sparse_S))
    for value_N, W_LO in zip(value_S, W_S, strict=True):
        check_decoder("grouped_decode", sparse_S[0].n_latents, value_N, W_LO, None)
    pairs = zip(sparse_S, value_S, strict=True)
    joined_S = [replace(latents.with_int32(), value_N=value_N) for latents, value_N in pairs]
    return joined_decode(joined_S, W_S, b_dec_O, list(first_S), n_out, backend)
