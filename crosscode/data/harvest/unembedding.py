"""From the residual stream to logits: a language model's own final norm and unembedding.

N vectors · D width of the residual stream · V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crosscode.data.harvest.hookpoints import blocks_path, find_taps
from crosscode.data.harvest.language_models import LanguageModel
from crosscode.errors import InputError


@torch.no_grad()
def unembed(model: LanguageModel, resid_ND: Tensor) -> Tensor:
    """`logits_NV` (float32, on the model's device) of vectors in the residual stream, computed in the model's dtype.

    Zeros beyond the width of the residual stream are padding (`ActivationHarvester`).

    What some models put behind the unembedding (a soft cap, a scale) keeps the order of tokens and is left out.

    Raises:
        InputError: vectors of another width, or a model without final norm or unembedding.
    """
    if resid_ND.shape[-1] < model.d_model or bool(resid_ND[..., model.d_model :].any()):
        raise InputError(
            f"logits: vectors of width {resid_ND.shape[-1]} are not in the residual stream of {model.name!r}, "
            f"which is {model.d_model} wide"
        )
    head = model.model.get_output_embeddings()
    if head is None:
        raise InputError(f"logits: {model.name!r} has no unembedding")
    return head(final_norm(model)(resid_ND[..., : model.d_model].to(model.device, model.dtype))).float()


def final_norm(model: LanguageModel) -> Any:
    """The norm between the last block and the unembedding: that of the family, or the one that stands beside the blocks.

    Raises:
        InputError: it is not known which.
    """
    tap = find_taps(model).get("ln_final.hook_out")
    if tap is not None:
        return model.model.get_submodule(tap.module_path)
    path = blocks_path(model)
    beside = [] if path is None else list(model.model.get_submodule(path.rpartition(".")[0]).named_children())
    norms = [one for name, one in beside if "norm" in type(one).__name__.lower() and "embed" not in name]
    if len(norms) != 1:
        raise InputError(
            f"logits: {model.name!r} has {len(norms)} norms beside its blocks, so that none is known as the last"
        )
    return norms[0]
