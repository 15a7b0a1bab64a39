"""What a run shows of latents: those of a text, and what one of them writes.

Axes: S tokens · M models · P hookpoints · D width · L latents · X output positions (flattened) · V vocabulary.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from crosscode.analysis.encoded import active_entries
from crosscode.analysis.example_pool import Example
from crosscode.analysis.records import Unembed
from crosscode.analysis.tokens import DisplayToken, TokenDisplay
from crosscode.build.experiment import Experiment
from crosscode.build.finished import FinishedRun
from crosscode.build.foresight import foreseen_reads, foreseen_widths, skeletons_of
from crosscode.build.heldout import AnyExperiment
from crosscode.data.harvest.unembedding import unembed
from crosscode.data.text.prompts import Prompt, in_other_tokens, prompt_ids
from crosscode.errors import InputError
from crosscode.models.decoder_vectors import decoder_vectors_NXD
from crosscode.widths import Widths

log = logging.getLogger("crosscode")


@dataclass(frozen=True)
class TextLatents:
    """Latents of one text."""

    tokens: list[str]
    """S tokens as text"""
    token_ids: list[int]
    """of the language model's tokenizer, the beginning-of-sequence token first where training had one"""
    values_SL: Tensor
    """sparse CSR, float32, on the CPU"""

    def strongest(self, position: int, n: int = 10) -> list[tuple[int, float]]:
        """`(latent, activation)` of the largest latents at a position."""
        row_L = self.values_SL[position]
        order = row_L.values().argsort(descending=True)[:n]
        return [(int(row_L.indices()[0, i]), float(row_L.values()[i])) for i in order]


@dataclass(frozen=True)
class ShownExample:
    """A place where a latent is active: an `example` (value, tokens), and the text around it as it is `shown`."""

    example: Example
    shown: list[DisplayToken]

    @property
    def activation(self) -> float:
        """Of the latent at the peak, on raw activations."""
        return self.example.value

    @property
    def text(self) -> str:
        """The text around, the peak in « »."""
        return "".join(f"«{token.text}»" if token.is_peak else token.text for token in self.shown)

    def __str__(self) -> str:
        return f"{self.activation:8.3f}  {self.text}"


@dataclass(frozen=True)
class LatentLogits:
    """What a latent writes at one output position, read through the model's own final norm and unembedding; `tokenizer`
    shows it."""

    logits_V: Tensor
    """float32, on the CPU"""
    tokenizer: Any

    def top(self, n: int = 10) -> list[tuple[str, float]]:
        """`(token, logit)` of the n largest."""
        return self._ends(n, largest=True)

    def bottom(self, n: int = 10) -> list[tuple[str, float]]:
        """`(token, logit)` of the n smallest."""
        return self._ends(n, largest=False)

    def _ends(self, n: int, *, largest: bool) -> list[tuple[str, float]]:
        found = self.logits_V.topk(min(n, self.logits_V.shape[0]), largest=largest)
        ids = found.indices.tolist()
        return list(zip(token_texts(self.tokenizer, ids), found.values.tolist(), strict=True))


def token_texts(tokenizer: Any, token_ids: list[int]) -> list[str]:
    """Tokens as they are shown, each by itself."""
    return [*map(TokenDisplay(tokenizer).text, token_ids)]


def text_experiment(run: FinishedRun, asked: str) -> Experiment:
    """The experiment of a run on language models.

    Args:
        asked: what needs them, for the message.

    Raises:
        InputError: the run is on activations that were given.
    """
    if not isinstance(run.experiment, Experiment):
        raise InputError(f"{asked}: this run is on activations that were given, so that it knows no language model")
    return run.experiment


def reads_and_widths(run: FinishedRun, asked: str) -> tuple[list[int], Widths]:
    """Which tokenizer each language model reads, as `by_tokenizer` counts them, and how wide its hookpoints are: from their
    configurations, where these tell it and none is loaded yet. `asked`: as of `text_experiment`."""
    config = run.config
    if config.language_models and "experiment" not in vars(run):
        reads_M = foreseen_reads(config.language_models)
        widths_MP = foreseen_widths(skeletons_of(config), config.hookpoints)
        if reads_M is not None and widths_MP is not None:
            return reads_M, widths_MP
    harvester = text_experiment(run, asked).harvester
    return harvester.reads_M, harvester.widths_MP


def latents_of_text(run: FinishedRun, text: Prompt) -> TextLatents:
    """See `Run.latents`."""
    experiment = text_experiment(run, "latents(text)")
    harvester = experiment.harvester
    ids = ids_of_prompt(run, text)
    bos = experiment.config.data.bos != "none"
    others = in_other_tokens(experiment.tokenizer, harvester.other_tokenizers, text, len(ids), bos=bos)
    acts_SMPD = harvester.harvest(torch.tensor([ids]), others=others)[0].float().to(run.model.device)
    with torch.no_grad():
        entries = active_entries(run.model.encode_latents(experiment.split.activations(acts_SMPD)[0]))
    index_2N = torch.stack([entries.token_N, entries.latent_N]).cpu()
    value_N, size = entries.value_N.float().cpu(), (len(ids), entries.n_latents)
    for other in others:  # where one of the models reads no such token there are no latents
        kept_N = other.place_HS[0][index_2N[0]] >= 0
        index_2N, value_N = index_2N[:, kept_N], value_N[kept_N]
    values_SL = torch.sparse_coo_tensor(index_2N, value_N, size, check_invariants=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return TextLatents(token_texts(experiment.tokenizer, ids), ids, values_SL.to_sparse_csr())


def ids_of_prompt(run: FinishedRun, prompt: Prompt, *, to_answer: bool = False, model: int = 0) -> list[int]:
    """Token ids of a language model, with BOS where training had it; `to_answer`: a chat ends where the answer begins."""
    experiment = text_experiment(run, "text")
    bos, limit = run.config.data.bos != "none", experiment.harvester.max_sequence_length
    tokenizer = experiment.harvester.tokenizer_of(model)
    return prompt_ids(tokenizer, prompt, bos=bos, to_answer=to_answer, max_length=limit)


def unembeds_of(experiment: AnyExperiment) -> dict[int, Unembed]:
    """By number of an output position in a residual stream; what the others lack is logged."""
    if not isinstance(experiment, Experiment):
        return {}
    found, refusals = _unembeds(experiment)
    for error in refusals:
        log.warning("%s; the report shows none", error)
    return found


def _unembeds(experiment: Experiment) -> tuple[dict[int, Unembed], list[InputError]]:
    """And why there are none of other output positions."""
    models, widths_MP = experiment.harvester.models, experiment.harvester.widths_MP
    places = experiment.split.output_places(*experiment.harvester.dims[:2])
    refusals: dict[tuple[int, int], InputError] = {}
    kinds = dict.fromkeys((m, widths_MP[m][p]) for m, p in places)
    for m, width in kinds:
        try:
            unembed(models[m], torch.ones(1, width))
        except InputError as error:
            refusals[m, width] = error
    found = {x: partial(unembed, models[m]) for x, (m, p) in enumerate(places) if (m, widths_MP[m][p]) not in refusals}
    return found, list(refusals.values())


def displays_of(experiment: AnyExperiment) -> dict[int, TokenDisplay]:
    """Of output positions whose language model has a tokenizer of its own."""
    if not isinstance(experiment, Experiment):
        return {}
    harvester = experiment.harvester
    places = enumerate(experiment.split.output_places(*harvester.dims[:2]))
    return {x: TokenDisplay(harvester.tokenizer_of(m)) for x, (m, _) in places if harvester.reads_M[m]}


def tokenizers_of(experiment: AnyExperiment) -> dict[str, Any]:
    """Where language models have several tokenizers: each, the first one first, by the names of those that read its tokens."""
    if not isinstance(experiment, Experiment) or not experiment.harvester.other_tokenizers:
        return {}
    harvester = experiment.harvester
    first_of = [harvester.reads_M.index(number) for number in range(len(harvester.other_tokenizers) + 1)]
    names = [lm.short_name() for lm in experiment.config.language_models]
    return {
        ", ".join(
            name for name, own in zip(names, harvester.reads_M, strict=True) if own == number
        ): harvester.tokenizer_of(m)
        for number, m in enumerate(first_of)
    }


def logits_of_latent(run: FinishedRun, latent: int) -> dict[str, LatentLogits]:
    """See `Run.logits`."""
    experiment = text_experiment(run, "logits(latent)")
    harvester, names = experiment.harvester, experiment.output_names()
    vectors_XD = decoder_vectors_NXD(run.model, torch.tensor([latent]))[0]
    places = experiment.split.output_places(*harvester.dims[:2])
    unembeds, refusals = _unembeds(experiment)
    if not unembeds:
        raise refusals[0]
    return {
        names[x]: LatentLogits(read(vectors_XD[x, None])[0].cpu(), harvester.tokenizer_of(places[x][0]))
        for x, read in unembeds.items()
        if bool(vectors_XD[x].any())
    }
