"""The causal claim of a model diff: which latents are added to the other model, and what that closes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

from crosscode.analysis.latents_pass import LatentsPass, study_latents
from crosscode.analysis.verdict import Verdict
from crosscode.build.data import build_token_loader
from crosscode.build.experiment import Experiment
from crosscode.build.finished import FinishedRun
from crosscode.commands.parts.reading import reads_and_widths, text_experiment
from crosscode.commands.parts.steering import Model, check_latent, chosen_models, model_names
from crosscode.data.text.tokens import TokenSequenceLoader
from crosscode.errors import InputError
from crosscode.evaluation.closes import Closes, check_common, measure_closes
from crosscode.models.architecture import split_for

N_LEANING = 10
N_TO_FIND_A_CHAT = 64


def closes_of(
    run: FinishedRun,
    latents: Sequence[int] | None = None,
    study: LatentsPass | None = None,
    model_a: Model = 0,
    model_b: Model = 1,
    *,
    n_tokens: int = 4096,
    n_random: int = 5,
    seed: int = 0,
) -> Closes:
    """See `Run.closes`. `study`: of the run, where it is there already."""
    (a,), (b,) = (chosen_models(run, one) for one in (model_a, model_b))
    check_closes(run, a, b)
    experiment = text_experiment(run, "closes")
    if latents is None:
        if study is None:
            names = experiment.output_names()
            study = study_latents(run.model, experiment.heldout_batches(), experiment.split, names)
        latents = latents_of_b(study.verdicts, *(model_names(run)[m] for m in (a, b)))
    for latent in latents:
        check_latent(run, latent)
    measure = partial(
        measure_closes,
        run.model,
        experiment.harvester,
        build_token_loader(experiment, heldout=True),
        experiment.split,
        list(dict.fromkeys(latents)),
        run.max_activation_L > 0,
        model_a=a,
        model_b=b,
        n_tokens=n_tokens,
        n_random=n_random,
        seed=seed,
        groupings=experiment.groupings(),
    )
    found = measure(limit=experiment.norm_limit())
    answers = _answers(experiment)
    if answers is None:
        return found
    return replace(found, answers=measure(limit=experiment.norm_limit(), counted=answers))


def _answers(experiment: Experiment) -> TokenSequenceLoader | None:
    """The held-out text with masks of what the assistant says; None where it does not seem to hold chats."""
    tokenizer = experiment.tokenizer
    if getattr(tokenizer, "chat_template", None) is None or not getattr(tokenizer, "is_fast", False):
        return None
    documents = islice(experiment.heldout_documents.open(), N_TO_FIND_A_CHAT)
    if not any(len(one) and isinstance(one[0], dict) for one in documents):
        return None
    return build_token_loader(experiment, heldout=True).fresh(template_tokens="answers")


def check_closes(run: FinishedRun, model_a: int, model_b: int) -> None:
    """Raise `InputError` where these models are not two of which something can be closed: before they are loaded, where
    their configurations tell."""
    config = run.config
    if len(config.language_models) < 2:
        raise InputError("closes: needs a crosscoder between two language models")
    check_common(split_for(config.crosscoder.type), *reads_and_widths(run, "closes"), model_a, model_b)


def latents_of_b(verdicts: Sequence[Verdict], name_a: str, name_b: str) -> list[int]:
    """Latents that are specific to B; where there are none, the first 10 of B's ranking.

    Raises:
        InputError: the two models are not compared, or no latent leans to B.
    """
    verdict = next((one for one in verdicts if {one.name_a, one.name_b} == {name_a, name_b}), None)
    if verdict is None:
        raise InputError(f"closes: {name_a!r} and {name_b!r} are not compared in this run; name latents")
    found = verdict.specific(name_b) or verdict.ranking(name_b)[:N_LEANING]
    if not found:
        raise InputError(f"closes: no latent leans to {name_b!r}")
    return found
