"""Skip transcoders that start from a rotation.

Axes: Xi/Xo input/output crosscoding dims · Di/Do widths · I/O flattened.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveFloat

from crosscode.errors import InputError
from crosscode.models.coder import Coder
from crosscode.models.initialization.base import INITIALIZATIONS, randn
from crosscode.models.initialization.zero_dec_skip import ZeroDecSkipInit


@INITIALIZATIONS.register
class OrthogonalSkipInit(ZeroDecSkipInit):
    """As `ZeroDecSkipInit`, but the skip matrix `[I, O]` is a random one with orthonormal rows (or columns, whichever
    are fewer), times `skip_gain`; `b_dec` makes up for what it adds to the mean."""

    class Config(ZeroDecSkipInit.Config):
        type: Literal["orthogonal_skip"] = "orthogonal_skip"  # pyright: ignore[reportIncompatibleVariableOverride]
        skip_gain: PositiveFloat = 1.0
        """length of the skip matrix's orthogonal vectors"""

    def check_model(self, model: Coder) -> None:
        if model.W_skip_XiDiXoDo is None:
            raise InputError(
                "crosscoder.init.type = 'orthogonal_skip': the model has no linear skip (linear_skip = false)"
            )

    def init_skip(self, model: Coder, generator: torch.Generator) -> None:
        W_skip = model.W_skip_XiDiXoDo
        assert W_skip is not None
        n_in, n_out = model.W_enc_LI.shape[1], model.W_dec_LO.shape[1]
        tall = randn((max(n_in, n_out), min(n_in, n_out)), generator, W_skip).float()
        q, r = torch.linalg.qr(tall)
        # The signs of R's diagonal make the distribution uniform and the factorisation unique.
        q = q * r.diagonal().sign()
        W_skip_IO = q if n_in >= n_out else q.T
        W_skip.copy_((self.skip_gain * W_skip_IO).reshape(W_skip.shape))
