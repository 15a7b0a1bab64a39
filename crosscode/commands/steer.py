"""`crosscode steer`: what the language models write when latents are added or taken out."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from crosscode.commands.parts.command import Command, RunOptions
from crosscode.commands.parts.libraries import quiet_libraries


class Options(RunOptions):
    latent: list[NonNegativeInt] = Field(min_length=1, title="LATENT")
    """which latent; several times for several latents"""
    strength: float = 1.0
    """how much is added, in multiples of the latent's largest held-out activation"""
    ablate: bool = False
    """take out what the latent writes, instead of adding"""
    prompt: str = Field(title="TEXT")
    """what the language models go on from"""
    chat: bool = False
    """the prompt is what a user says: it passes through the tokenizer's chat template, and the model answers"""
    models: list[str] | None = Field(default=None, title="NAME")
    """language models, by name; null: all of the run's"""
    positions: Literal["all", "prompt", "generated"] | NonNegativeInt = "all"
    """where: all, prompt, generated, or the position from which on"""
    n_tokens: PositiveInt = 40
    """tokens to write"""
    samples: NonNegativeInt = 0
    """continuations to draw; 0: one, of the most probable tokens"""
    temperature: PositiveFloat = 1.0
    """of the draws"""
    seed: NonNegativeInt = 0
    """of the draws and of the random direction"""


def run(options: Options) -> None:
    from crosscode.build.finished import FinishedRun
    from crosscode.commands.parts.steering import compare_steered, lines_of

    quiet_libraries()
    found = compare_steered(
        FinishedRun(options.run_dir, options.trust_remote_code),
        [{"role": "user", "content": options.prompt}] if options.chat else options.prompt,
        {} if options.ablate else dict.fromkeys(options.latent, options.strength),
        options.latent if options.ablate else (),
        models=options.models,
        positions=options.positions,
        n_tokens=options.n_tokens,
        samples=options.samples,
        temperature=options.temperature,
        seed=options.seed,
    )
    of = f"latent {', '.join(map(str, options.latent))}"
    what = f"{of} taken out" if options.ablate else f"{of} x {options.strength:g}"
    print("\n".join(lines_of(found, what)))


COMMAND = Command(
    "what the language models write when latents are added or taken out", run, Options, positional="run_dir"
)
