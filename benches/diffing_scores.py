"""What a model of two language models' activations finds of a change that is known: the scores of `diffing.py`.

Letters: B held-out tokens · L latents · N active entries · S positions of a prompt · V vocabulary · H sequences.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from crosscode.analysis.encoded import EncodedBatch
from crosscode.analysis.latents_pass import LatentsPass, study_latents
from crosscode.analysis.verdict import MIN_FIRINGS
from crosscode.build.experiment import Experiment
from crosscode.build.heldout import HeldoutBatch
from crosscode.demo.plants import Plant, planted_positions, planted_prompts
from crosscode.evaluation.intervention import Interventions
from crosscode.models.architecture import split_for
from crosscode.models.base import BaseCrosscoder

UNSCORED = 40
"""First positions of a sequence, which may lie in a statement whose beginning was cut off."""
N_TOP = 10
TRUE_SHARE = 0.5


@dataclass(frozen=True)
class Pair:
    """The base and one planted model, with their activations, the same for all runs on them."""

    plant: Plant
    experiment: Experiment
    acts_BMPD: Tensor
    heldout: list[HeldoutBatch]


class Entries:
    """Keeps every active entry, and which tokens are at known positions."""

    def __init__(self, tokenizer: Any, plant: Plant):
        self._known_of = partial(planted_positions, tokenizer=tokenizer, plant=plant)
        self.known: list[np.ndarray] = []
        self._parts: list[tuple[np.ndarray, ...]] = []
        self._n = 0

    def update(self, batch: EncodedBatch) -> None:
        known_HS = np.stack([self._known_of(row).either for row in batch.tokens_HS.tolist()])
        position_B = batch.position_B.numpy()
        scored_B = position_B % known_HS.shape[1] >= UNSCORED
        entries = batch.entries
        token_N, latent_N, value_N = (x.numpy() for x in (entries.token_N, entries.latent_N, entries.value_N))
        kept_N = scored_B[token_N]
        place_B = self._n + np.cumsum(scored_B) - 1
        self._parts.append((place_B[token_N[kept_N]], latent_N[kept_N], value_N[kept_N]))
        self.known.append(known_HS.flatten()[position_B[scored_B]])
        self._n += int(scored_B.sum())

    def scores(self, n_latents: int) -> tuple[np.ndarray, np.ndarray, Callable[[int], np.ndarray]]:
        """Known positions `[B]`, share of each latent's activation there `[L]`, and its activations by number."""
        token_N, latent_N, value_N = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        known_B = np.concatenate(self.known)
        all_L, there_L = (
            np.bincount(latent_N, weights, minlength=n_latents) for weights in (value_N, value_N * known_B[token_N])
        )

        def activation_B(latent: int) -> np.ndarray:
            of_latent = latent_N == latent
            found_B = np.zeros(len(known_B))
            found_B[token_N[of_latent]] = value_N[of_latent]
            return found_B

        return known_B, there_L / np.maximum(all_L, 1e-30), activation_B


def auroc(score_B: np.ndarray, known_B: np.ndarray) -> float:
    """Chance that a known position scores above another one; ties count half."""
    n_known = int(known_B.sum())
    rank_sum = rankdata(score_B)[known_B].sum()
    return float((rank_sum - n_known * (n_known + 1) / 2) / (n_known * (len(known_B) - n_known)))


def ranking_of(study: LatentsPass) -> list[int]:
    """Latents that are to be looked at first."""
    if study.verdicts:
        return study.verdicts[0].ranking("planted")
    # the difference is all there is: as the verdict's effect, the size of the vector where the latent fires
    effect_L = (study.firing.mean_active_L * study.decoder_norm_LX[:, -1]).numpy()
    return [int(latent) for latent in np.argsort(-effect_L) if study.firing.counts_L[latent] >= MIN_FIRINGS]


def score(pair: Pair, model: BaseCrosscoder, architecture: str) -> dict[str, Any]:
    """The row of one model."""
    split = split_for(architecture)
    names = split.output_names(pair.experiment.config.position_names())
    entries = Entries(pair.experiment.tokenizer, pair.plant)
    study = study_latents(model, pair.heldout, split, names, more=(entries,))
    known_B, share_L, activation_B = entries.scores(model.n_latents)
    ranking = ranking_of(study)
    top = ranking[:N_TOP]
    ranks = [rank for rank, latent in enumerate(ranking, 1) if share_L[latent] >= TRUE_SHARE]
    activations = [activation_B(latent) for latent in top]
    together_B = sum((a_B / max(a_B.max(), 1e-30) for a_B in activations), np.zeros(len(known_B)))
    return {
        "top": top,
        "share_at_known_positions": [round(float(share_L[latent]), 3) for latent in top],
        "n_ranked": len(ranking),
        "n_true": len(ranks),
        "first_true_rank": min(ranks, default=None),
        "false_among_top": sum(bool(share_L[latent] < TRUE_SHARE) for latent in top),
        "auroc_first": auroc(activations[0], known_B) if top else None,
        "auroc_top": auroc(together_B, known_B) if top else None,
        "n_known": int(known_B.sum()),
        "n_tokens": len(known_B),
        "headline": study.verdicts[0].headline() if study.verdicts else None,
        **effects(pair, Interventions(model, split, pair.experiment.harvester), study, top),
    }


def effects(pair: Pair, interventions: Interventions, study: LatentsPass, top: Sequence[int]) -> dict[str, float]:
    """Change of the behaviour's log probability in the planted model, in nats: the first latent added at its largest
    activation where nothing announces the behaviour; the first ten taken out where something does; each beside the mean
    of three random directions of the same norms."""
    if not top:
        return {}
    amounts = {top[0]: float(study.firing.max_L[top[0]])}
    found: dict[str, float] = {}
    for name, latents, announced in (("steer", top[:1], False), ("ablate", top, True)):

        def change(vectors_NXD: Tensor | None, name: str = name) -> AbstractContextManager[None]:
            if name == "steer":
                return interventions.steer(amounts, [1], "all", vectors_NXD)
            return interventions.ablate(top, [1], "all", vectors_NXD)

        before = behaviour(pair, announced, nullcontext)
        found[name] = behaviour(pair, announced, partial(change, None)) - before
        random = [interventions.random_vectors_NXD(latents, seed) for seed in range(3)]
        found[f"{name}_random"] = statistics.mean(
            behaviour(pair, announced, partial(change, vectors_NXD)) - before for vectors_NXD in random
        )
    return found


@torch.no_grad()
def behaviour(pair: Pair, announced: bool, changed: Callable[[], AbstractContextManager[None]]) -> float:
    """Mean log probability of what the plant makes the model say."""
    lm, tokenizer = pair.experiment.harvester.models[1], pair.experiment.tokenizer
    nats = []
    for prompt, said in planted_prompts(pair.plant):
        if not announced and pair.plant != "style":
            prompt = prompt[: prompt.rindex("#") + 1]
        ids, said_ids = tokenizer(prompt)["input_ids"], tokenizer(said, add_special_tokens=False)["input_ids"]
        with changed():
            logits_SV = lm.model(torch.tensor([ids + said_ids]), use_cache=False).logits[0, len(ids) - 1 : -1].float()
        nats.append(logits_SV.log_softmax(-1)[range(len(said_ids)), said_ids].sum().item())
    return statistics.mean(nats)
