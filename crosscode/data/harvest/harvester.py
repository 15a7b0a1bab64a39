"""Tokens in, activations out: several models, several hookpoints, one tensor.

H harvest batch (sequences) · S sequence · M models · P hookpoints · D model dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from crosscode.data.harvest.language_models import DTYPES, LanguageModel, by_tokenizer
from crosscode.data.harvest.model_runs import BridgeRun, HarvestPath, ModuleRun, make_run
from crosscode.data.harvest.probe import check_names, probe_widths
from crosscode.data.text.aligned import OtherTokens
from crosscode.errors import InputError
from crosscode.stopping import interruptible
from crosscode.widths import Widths

_RESIDUAL_NUMBERS_PER_THREAD = 3 << 17


class ActivationHarvester:
    """Runs M language models over tokens and keeps P activations of each.

    A model whose hookpoints are all inputs or outputs of modules runs as the plain `transformers` model with forward
    hooks and stops right after the last one has fired; otherwise that model runs in TransformerBridge
    (`path="modules"` or `"bridge"` insists on one of them). `dtype` and `device` are those of the returned tensor;
    each model runs in its own dtype, on its own device.

    Vectors of different width (`widths_MP`) are padded with zeros to the widest. Models whose tokenizer is not the first one's
    (`reads_M`: 0 for that, else which of `other_tokenizers`, from 1) read tokens of their own. `readers`: all models whose text
    this is, where `models` are some of them; the others are not run, and need no weights.

    Raises InputError for an unknown or repeated hookpoint.
    """

    def __init__(
        self,
        models: Sequence[LanguageModel],
        hookpoints: Sequence[str],
        *,
        dtype: str = "float32",
        device: str | torch.device | None = None,
        path: HarvestPath = "auto",
        readers: Sequence[LanguageModel] = (),
    ) -> None:
        if not models:
            raise InputError("models: at least one language model is needed")
        if not hookpoints:
            raise InputError("hookpoints: at least one is needed, such as blocks.0.hook_resid_post")
        repeated = sorted({name for name in hookpoints if list(hookpoints).count(name) > 1})
        if repeated:
            raise InputError(f"hookpoints: {repeated[0]!r} is named twice")
        if dtype not in DTYPES:
            raise InputError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
        self.models = list(models)
        readers = readers or models
        reads, self.other_tokenizers = by_tokenizer(readers)
        of_reader = {id(reader): number for reader, number in zip(readers, reads, strict=True)}
        self.reads_M = [of_reader[id(model)] for model in models]
        self.tokenizer = readers[0].tokenizer
        self.hookpoints = list(hookpoints)
        self.dtype = DTYPES[dtype]
        self.device = torch.device(device) if device is not None else models[0].device
        self.runs = [make_run(model, self.hookpoints, path) for model in self.models]
        # Of a model that other ranks hold they say the widths.
        self.widths_MP = Widths(
            probe_widths(run, self.hookpoints) if run.model.is_here else (0,) * len(hookpoints) for run in self.runs
        )
        for run in self.runs_here:
            check_names(run, self.hookpoints)

    @property
    def runs_here(self) -> list[ModuleRun | BridgeRun]:
        """Of the models that this process holds."""
        return [run for run in self.runs if run.model.is_here]

    @property
    def dims(self) -> tuple[int, int, int]:
        """(M, P, D), D of the widest."""
        return len(self.models), len(self.hookpoints), self.widths_MP.widest

    def tokenizer_of(self, m: int) -> Any:
        """Of the tokens that model m reads."""
        return self.other_tokenizers[self.reads_M[m] - 1][0] if self.reads_M[m] else self.tokenizer

    @property
    def paths(self) -> list[str]:
        """How each model is read: "modules" or "bridge"."""
        return [run.kind for run in self.runs]

    def bridge(self, m: int) -> Any | None:
        """The TransformerBridge in which model m is read; None where it runs as the plain model."""
        run = self.runs[m]
        return run.bridge if isinstance(run, BridgeRun) else None

    @property
    def max_sequence_length(self) -> int | None:
        """Positions that all models of the first one's tokenizer take; None: without a limit."""
        limits = [model.max_sequence_length for model in self._of_first()]
        return min((limit for limit in limits if limit), default=None)

    @property
    def vocab_size(self) -> int:
        """Token ids that all models of the first one's tokenizer know."""
        return min((model.vocab_size for model in self._of_first()), default=1 << 31)

    def _of_first(self) -> list[LanguageModel]:
        return [model for model, reads in zip(self.models, self.reads_M, strict=True) if not reads]

    def harvest(
        self,
        tokens_HS: torch.Tensor,
        segments_HS: torch.Tensor | None = None,
        others: Sequence[OtherTokens] = (),
    ) -> torch.Tensor:
        """Activations `acts_HSMPD` of `tokens_HS` (int64), in `dtype` on `device`.

        `segments_HS` (int64): number of the document that each position belongs to, growing along the sequence; then
        attention stays within a document and positions count from its start. Sequences are padded on the right, so
        that padding cannot reach earlier positions. `others`: the same text for each of `other_tokenizers`; a model that
        reads it has its activations at the positions of `tokens_HS` that have a partner there, zeros elsewhere.
        """
        if tokens_HS.ndim != 2 or tokens_HS.shape[1] == 0:
            raise InputError(f"tokens_HS: shape {tuple(tokens_HS.shape)} should be (sequences, positions)")
        H, S = tokens_HS.shape
        self._check_tokens(tokens_HS)
        if len(others) < len(self.other_tokenizers):
            raise InputError(
                f"language_models: {', '.join(repr(model.name) for model in self.models)} have different tokenizers: token ids "
                "of the first are not enough; harvest the batches of a token loader"
            )
        out_HSMPD = torch.empty((H, S, *self.dims), dtype=self.dtype, device=self.device)
        self.widths_MP.clear_(out_HSMPD)
        for m, run in enumerate(self.runs):
            if not run.model.is_here:
                continue
            other = others[self.reads_M[m] - 1] if self.reads_M[m] else None
            own_HS, own_segments_HS = (
                (tokens_HS, segments_HS) if other is None else (other.tokens_HT, other.segments_HT)
            )
            positions_HS = None if own_segments_HS is None else positions_within_segments(own_segments_HS)
            n_at_once = _sequences_at_once(run.model, *own_HS.shape)
            for first in range(0, H, n_at_once):
                part = slice(first, first + n_at_once)
                partners = None if other is None else other[part]

                def keep(
                    p: int,
                    act: torch.Tensor,
                    m: int = m,
                    shape: torch.Size = own_HS[part].shape,
                    partners: OtherTokens | None = partners,
                    out_HSPD: torch.Tensor = out_HSMPD[part, :, m],
                ) -> None:
                    act = act.reshape(*shape, -1)
                    act = act if partners is None else partners.fetched(act)
                    out_HSPD[:, :, p, : self.widths_MP[m][p]] = act

                with interruptible():
                    run(own_HS[part], None if positions_HS is None else positions_HS[part], keep)
        return out_HSMPD

    def _check_tokens(self, tokens_HS: torch.Tensor) -> None:
        limit = self.max_sequence_length
        if limit is not None and tokens_HS.shape[1] > limit:
            raise InputError(f"sequence_length: {tokens_HS.shape[1]} is above the models' limit of {limit} positions")
        if tokens_HS.is_cuda or not tokens_HS.numel():
            return
        least, largest = (int(end) for end in tokens_HS.aminmax())
        if least < 0 or largest >= self.vocab_size:
            wrong = least if least < 0 else largest
            raise InputError(f"tokens: id {wrong} is outside the vocabulary of {self.vocab_size}")


def check_hookpoints(model: LanguageModel, hookpoints: Sequence[str]) -> None:
    """Raise InputError for a name that `model` does not have, with near matches. A skeleton is enough."""
    make_run(model, hookpoints, "auto")


def _sequences_at_once(model: LanguageModel, H: int, S: int) -> int:
    """On a CPU, so few that what a block of the model computes stays in memory that the process holds already: larger
    tensors are new to the operating system each time, which costs about a seventh of a harvest."""
    if model.device.type != "cpu":
        return max(1, H)
    n_threads = 1 if model.n_ranks > 1 else torch.get_num_threads()  # ranks that run it together run the same
    return max(1, _RESIDUAL_NUMBERS_PER_THREAD * n_threads // (model.d_model * S))


def positions_within_segments(segments_HS: torch.Tensor) -> torch.Tensor:
    """0, 1, 2, ... from the start of each segment: `transformers` derives the block-diagonal mask from these."""
    S = segments_HS.shape[1]
    index_S = torch.arange(S, device=segments_HS.device)
    starts_HS = torch.ones_like(segments_HS, dtype=torch.bool)
    starts_HS[:, 1:] = segments_HS[:, 1:] != segments_HS[:, :-1]
    start_index_HS = torch.where(starts_HS, index_S, 0).cummax(dim=1).values
    return index_S - start_index_HS
