"""What each language model of a run writes itself, with the activations of them all there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from crosscode.build.data import build_documents
from crosscode.build.experiment import Experiment
from crosscode.build.heldout import AnyExperiment, HeldoutBatch
from crosscode.config.sources import Mixture, Rollouts
from crosscode.errors import InputError

_TOKENS_OF_A_TEXT = 128


def own_texts(experiment: AnyExperiment, n_tokens: int) -> dict[str, Iterator[HeldoutBatch]]:
    """Batches by name of the language model, of about n_tokens that each writes after beginnings of the held-out text; kept as
    `Rollouts` are.

    Raises:
        InputError: no language models.
    """
    if not isinstance(experiment, Experiment):
        raise InputError("own_text: this run reads activations and knows no language model that could write")
    return {
        lm.short_name(): _batches(experiment, m, n_tokens) for m, lm in enumerate(experiment.config.language_models)
    }


def _batches(experiment: Experiment, m: int, n_tokens: int) -> Iterator[HeldoutBatch]:
    config = experiment.config
    prompts = config.data.heldout or config.data.source
    while isinstance(prompts, Mixture | Rollouts):
        prompts = prompts.parts[0].source if isinstance(prompts, Mixture) else prompts.prompts
    new = min(_TOKENS_OF_A_TEXT, config.data.sequence_length)
    rules = Rollouts.model_validate(
        {
            "type": "rollouts",
            "model": config.language_models[m],
            "prompts": prompts,
            "n_prompts": max(1, n_tokens // new),
            "max_new_tokens": new,
            "prompt_tokens": 8,
        }
    )
    documents = build_documents(rules, "own_text", config.device)
    own = replace(
        experiment,
        config=config.model_copy(update={"data": config.data.model_copy(update={"heldout": rules})}),
        heldout_documents=documents,
    )
    yield from own.heldout_batches(n_tokens)
