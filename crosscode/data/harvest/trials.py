"""Whether models do what a run asks of them, found by trying: documents that stay apart, sequences of a length.

H sequences · S sequence · M models · P hookpoints · D width.
"""

from __future__ import annotations

import torch

from crosscode.data.harvest.harvester import ActivationHarvester
from crosscode.data.harvest.probe import in_words, random_tokens, same
from crosscode.data.text.aligned import OtherTokens
from crosscode.errors import InputError


def check_isolation(harvester: ActivationHarvester) -> None:
    """Raise InputError for a model that lets a document see the one before it, though told where each begins.

    `transformers` makes a block-diagonal mask of the positions; models with attention of their own (BLOOM, OPT, ...) or
    with layers that carry a state (Mamba, hybrids) do not ask for it and say nothing. Found by trying: after two
    different first documents the same second one is, to rounding, the same, and what it is alone.
    """
    limit = min(16, harvester.max_sequence_length or 16)
    n_first = limit // 2
    smallest = min(harvester.models, key=lambda model: model.vocab_size)
    tokens_HS = random_tokens(smallest, 2, limit)
    tokens_HS[1, n_first:] = tokens_HS[0, n_first:]
    segments_HS = (torch.arange(limit) >= n_first).long().expand(2, limit)
    words = "isolate_documents: positions of their own for each document cannot be given to the models"
    with in_words(f"{words}; set pack: false, or isolate_documents: false"):
        isolated_HSMPD = _harvest(harvester, tokens_HS, segments_HS)[:, n_first:]
    alone_SMPD = _harvest(harvester, tokens_HS[:1, n_first:])[0].double()
    for m, model in enumerate(harvester.models):
        one, two = isolated_HSMPD[:, :, m].flatten(2)
        alone = alone_SMPD[:, m].flatten(1)
        # Other shapes take other kernels, whose rounding a deep model amplifies.
        far = 1e-3 if model.dtype == torch.float32 else 0.1
        is_like_alone = bool((one.double() - alone).norm() <= far * alone.norm())
        if not (is_like_alone and same(one, two, model)):
            raise InputError(
                f"isolate_documents: {model.name!r} ({type(model.model).__name__}) cannot keep attention inside a "
                "document; set pack: false, or isolate_documents: false"
            )


def _harvest(harvester: ActivationHarvester, tokens_HS: torch.Tensor, segments_HS: torch.Tensor | None = None):
    """The same ids for all models, whatever they mean."""
    place_HS = torch.arange(tokens_HS.shape[1]).expand(tokens_HS.shape)
    same_ids = OtherTokens(tokens_HS, place_HS >= 0, segments_HS, place_HS)
    return harvester.harvest(tokens_HS, segments_HS, [same_ids] * len(harvester.other_tokenizers))


def check_length(harvester: ActivationHarvester, length: int) -> None:
    """Raise InputError for sequences that are longer than a model takes: as its configuration and its table of positions
    say, and on a CPU by trying (on a GPU an index that is out of range ends the process' use of it)."""
    limit = harvester.max_sequence_length
    if (limit is None or length <= limit) and not _takes(harvester, length):
        least, limit = 1, length - 1
        while least < limit:
            middle = (least + limit + 1) // 2
            least, limit = (middle, limit) if _takes(harvester, middle) else (least, middle - 1)
    if limit is not None and length > limit:
        raise InputError(f"sequence_length: {length} is above the models' limit of {limit} positions")


def _takes(harvester: ActivationHarvester, length: int) -> bool:
    if any(run.model.device.type != "cpu" for run in harvester.runs_here):
        return True
    try:
        for run in harvester.runs_here:
            run(random_tokens(run.model, 1, length), None, lambda _p, _act: None)
    except (IndexError, RuntimeError) as error:
        if isinstance(error, InputError) or "memory" in str(error):
            raise
        return False
    return True
