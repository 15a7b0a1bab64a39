"""nested_decode: what each prefix of a dictionary decodes alone (Matryoshka; Bussmann et al. 2025, arXiv:2503.17547).

Axes: B tokens · S prefixes · O flattened output dims · L latents.

    y_bs = sum over the entries n of token b with l_n < size_s of a_n W_dec[l_n]  (+ b_dec)

Shapes: Latents over L, W_dec_LO, b_dec_O (optional), ascending sizes -> y_BSO.
Every entry is decoded once: the entries of a token are sorted by the segment between two sizes in which they lie, and what is
summed up is stored at the end of each segment. So the cost is that of `sparse_decode` and of S outputs.
Gradients: those of `sparse_decode`, each entry's from the sum of dy over the prefixes that hold it.
Errors (ValueError): sizes that do not ascend within 1 to L; those of `sparse_decode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from crosscode_kernels.backend import AnyBackend, backend_for
from crosscode_kernels.encoder import autocast
from crosscode_kernels.nested_decode import reference
from crosscode_kernels.nested_decode.autograd import split_decode
from crosscode_kernels.nested_decode.split import by_segment, split_tokens
from crosscode_kernels.opset import door
from crosscode_kernels.sparse import DenseLatents, Latents
from crosscode_kernels.sparse_decode import check_decoder


@door
def nested_decode(
    latents: Latents, W_dec_LO: Tensor, b_dec_O: Tensor | None, sizes: Sequence[int], *, backend: AnyBackend = "auto"
) -> Tensor:
    """`y_BSO`: the decode of the first `sizes[s]` latents, bias included, for every s."""
    backend = backend_for(backend, latents)
    if not sizes or list(sizes) != sorted({*sizes}) or not 1 <= sizes[0] <= sizes[-1] <= latents.n_latents:
        raise ValueError(
            f"nested_decode: sizes are {list(sizes)}; must ascend from at least 1 to at most {latents.n_latents}, the latents"
        )
    value, W_dec_LO, b_dec_O = autocast(backend, latents.value, W_dec_LO, b_dec_O)
    check_decoder("nested_decode", latents.n_latents, value, W_dec_LO, b_dec_O)
    if backend.name == "reference":
        return reference.nested_decode(latents, W_dec_LO, b_dec_O, sizes)
    if isinstance(latents, DenseLatents):
        y_BSO = by_segment(value, W_dec_LO, sizes).cumsum(1)
        return y_BSO if b_dec_O is None else y_BSO + b_dec_O
    split = split_tokens(replace(latents.with_int32(), value_N=value), sizes)
    return split_decode(split, W_dec_LO, b_dec_O, len(sizes), backend)
