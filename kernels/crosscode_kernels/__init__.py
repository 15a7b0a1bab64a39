"""Pure tensor functions of sparse coders: encode, decode, norms, penalties and losses, in three backends.

Every op is a function of this package (`from crosscode_kernels import encode_topk, sparse_decode`) that takes plain tensors and
`backend=`: see README.md beside the package, and the docstring of each op's folder for its maths.
"""

from crosscode_kernels.backend import AnyBackend, Backend, BackendName, BackendStatus, available_backends
from crosscode_kernels.opset import OpSet, find_ops, resolve_backend
from crosscode_kernels.sparse import DenseLatents, LatentOrder, Latents, SparseLatents

# The name of an op is that of its folder as well: here it is the function.
globals().update(_ops := find_ops())

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "AnyBackend",
    "Backend",
    "BackendName",
    "BackendStatus",
    "DenseLatents",
    "LatentOrder",
    "Latents",
    "OpSet",
    "SparseLatents",
    "available_backends",
    "resolve_backend",
    *_ops,
]
