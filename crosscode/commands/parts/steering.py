"""What the language models of a run do when its latents are added or taken out.

V vocabulary · S positions · X output crosscoding positions · D width · N latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, SupportsFloat, SupportsIndex

import torch
from torch import Tensor

from crosscode.build.finished import FinishedRun
from crosscode.commands.parts.reading import ids_of_prompt, text_experiment, token_texts
from crosscode.data.harvest.language_models import LanguageModel
from crosscode.data.text.prompts import Prompt
from crosscode.errors import InputError
from crosscode.evaluation.intervention import Interventions, Positions

Model = Any
"""A language model of a run: its name, its number, itself, or its `transformers` model."""
Models = Any
"""One of them, several, or None for all."""


@dataclass(frozen=True)
class Changed:
    """What an intervention did to one language model."""

    continuations: list[str]
    """as many as samples were asked for, or the one that takes the most probable token each time"""
    tokens: list[tuple[str, float, float]]
    """`(token, probability before, after)` of the next token after the prompt, the largest change first"""


@dataclass(frozen=True)
class Steered:
    """What one language model writes: `plain`, as it is; `changed`, with latents added or taken out; `random`, with random
    directions of the same norms instead."""

    plain: list[str]
    changed: Changed
    random: Changed


def interventions_of(run: FinishedRun) -> Interventions:
    """Of the run's own language models at its hookpoints."""
    experiment = text_experiment(run, "steer")
    return Interventions(run.model, experiment.split, experiment.harvester)


def steering(
    run: FinishedRun, strengths: Mapping[int, float], models: Models = None, positions: Positions = "all"
) -> AbstractContextManager[None]:
    """See `Run.steer`."""
    _check_positions(positions)
    amounts = amounts_of(run, strengths)
    return interventions_of(run).steer(amounts, chosen_models(run, models), positions)


def ablation(
    run: FinishedRun, latents: Iterable[int], models: Models = None, positions: Positions = "all"
) -> AbstractContextManager[None]:
    """See `Run.ablate`."""
    _check_positions(positions)
    wanted = list(dict.fromkeys(latents))
    for latent in wanted:
        check_latent(run, latent)
    return interventions_of(run).ablate(wanted, chosen_models(run, models), positions)


def amounts_of(run: FinishedRun, strengths: Mapping[int, float]) -> dict[int, float]:
    """Multiples of the largest held-out activation in units of activation.

    Raises:
        InputError: no such latent, or one that never fires.
    """
    amounts: dict[int, float] = {}
    for latent, strength in strengths.items():
        check_latent(run, latent)
        if not (isinstance(strength, SupportsFloat) and math.isfinite(strength)):
            raise InputError(f"strength = {strength!r} of latent {latent}: must be a finite number")
    for latent, strength in strengths.items():
        largest = float(run.max_activation_L[latent])
        if largest == 0 and strength != 0:
            raise InputError(
                f"latent = {latent}: never fires on held-out text, so it has no largest activation to multiply"
            )
        amounts[latent] = strength * largest
    return amounts


def check_latent(run: FinishedRun, latent: int) -> None:
    """Raise `InputError` where there is no such latent."""
    if not (_is_whole(latent) and 0 <= latent < run.model.n_latents):
        raise InputError(f"latent = {latent}: must be between 0 and {run.model.n_latents - 1}")


def _is_whole(value: Any) -> bool:
    """Whether it counts: also a number of NumPy, but not `True`."""
    return isinstance(value, SupportsIndex) and not isinstance(value, bool)


def model_names(run: FinishedRun) -> list[str]:
    """As the config has them."""
    return [lm.short_name() for lm in run.config.language_models]


def chosen_models(run: FinishedRun, models: Models) -> list[int]:
    """Numbers of the models that are meant.

    Raises:
        InputError: a model that the run does not have.
    """
    names = model_names(run)
    if not names:
        text_experiment(run, "models")
    if models is None:
        return list(range(len(names)))
    found: dict[int, None] = {}
    for one in models if isinstance(models, (list, tuple)) else [models]:
        if isinstance(one, (str, int)):  # known before anything is loaded
            of_one = [m for m, name in enumerate(names) if one in (name, m)]
        else:
            loaded = text_experiment(run, "models").harvester.models
            of_one = [m for m, lm in enumerate(loaded) if one is lm or one is lm.model]
        if not of_one:
            raise InputError(f"models: {str(one)[:80]!r} is not one of this run's: {', '.join(names)}")
        found[of_one[0]] = None
    return list(found)


def _check_positions(positions: Positions) -> None:
    if positions not in ("all", "prompt", "generated") and not (_is_whole(positions) and positions >= 0):
        raise InputError(f"positions = {positions!r}: must be all, prompt, generated, or a number of 0 or more")


# ---- trying it out


def compare_steered(
    run: FinishedRun,
    prompt: Prompt,
    strengths: Mapping[int, float] | None = None,
    ablate: Sequence[int] = (),
    *,
    models: Models = None,
    positions: Positions = "all",
    n_tokens: int = 40,
    samples: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
    n_changed: int = 8,
) -> dict[str, Steered]:
    """See `Run.compare_steered`."""
    if bool(strengths) == bool(ablate):
        raise InputError("steer: give latents to add (strengths) or latents to take out (ablate), one of the two")
    _check_positions(positions)
    chosen, latents = chosen_models(run, models), list(dict.fromkeys(ablate))
    for latent in latents:
        check_latent(run, latent)
    amounts, interventions = amounts_of(run, strengths or {}), interventions_of(run)
    ids_M = {m: ids_of_prompt(run, prompt, to_answer=True, model=m) for m in chosen}
    limit = interventions.harvester.max_sequence_length
    longest = max(map(len, ids_M.values()))
    room = n_tokens if limit is None else min(n_tokens, limit - longest)
    if room < 1:
        raise InputError(f"prompt: {longest} tokens leave no room for an answer; the models take {limit}")
    how = {"samples": samples, "temperature": temperature, "seed": seed, "n_tokens": room}
    random_NXD = interventions.random_vectors_NXD(latents or [*amounts], seed)

    def changing(m: int, vectors_NXD: Tensor | None) -> AbstractContextManager[None]:
        if latents:
            return interventions.ablate(latents, [m], positions, vectors_NXD)
        return interventions.steer(amounts, [m], positions, vectors_NXD)

    found: dict[str, Steered] = {}
    for m, ids in ids_M.items():
        lm, tokenizer = interventions.harvester.models[m], interventions.harvester.tokenizer_of(m)
        plain, before_V = _continue(lm, tokenizer, ids, nullcontext(), **how)
        of_kind = []
        for vectors_NXD in (None, random_NXD):
            texts, after_V = _continue(lm, tokenizer, ids, changing(m, vectors_NXD), **how)
            top = (after_V - before_V).abs().topk(min(n_changed, len(after_V))).indices.tolist()
            pairs = zip(token_texts(tokenizer, top), before_V[top].tolist(), after_V[top].tolist(), strict=True)
            of_kind.append(Changed(texts, list(pairs)))
        found[model_names(run)[m]] = Steered(plain, *of_kind)
    return found


@torch.no_grad()
def _continue(
    lm: LanguageModel,
    tokenizer: Any,
    ids: Sequence[int],
    changed: AbstractContextManager[None],
    *,
    samples: int,
    temperature: float,
    seed: int,
    n_tokens: int,
) -> tuple[list[str], Tensor]:
    """Continuations, and the probabilities `probs_V` of the next token."""
    ids_1S = torch.tensor([ids], device=lm.device)
    how: dict[str, Any] = {"do_sample": False}
    if samples:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "num_return_sequences": samples}
    devices = [lm.device] if lm.device.type == "cuda" else []
    with changed, torch.random.fork_rng(devices=devices):
        probs_V = lm.model(input_ids=ids_1S, use_cache=False).logits[0, -1].float().softmax(-1).cpu()
        torch.manual_seed(seed)
        made = lm.model.generate(
            input_ids=ids_1S,
            attention_mask=torch.ones_like(ids_1S),
            max_new_tokens=n_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **how,
        )
    return [tokenizer.decode(row[len(ids) :], skip_special_tokens=True) for row in made.tolist()], probs_V


def lines_of(found: Mapping[str, Steered], what: str) -> Iterator[str]:
    """For a terminal. `what`: the name of the intervention."""
    for name, steered in found.items():
        yield f"== {name}"
        for title, texts in (
            ("as it is", steered.plain),
            (what, steered.changed.continuations),
            ("random direction, equal norm", steered.random.continuations),
        ):
            yield f"-- {title}"
            yield from (f"{i}: {text}" if len(texts) > 1 else text for i, text in enumerate(texts))
        for title, changed in ((what, steered.changed), ("random direction, equal norm", steered.random)):
            yield f"-- next token, {title}: probability before and after"
            if all(before == after for _, before, after in changed.tokens):
                yield "unchanged"
                continue
            width = max(len(repr(token)) for token, _, _ in changed.tokens)
            for token, before, after in changed.tokens:
                yield f"{token!r:<{width}}  {before:.4f}  {after:.4f}"
