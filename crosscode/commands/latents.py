"""`crosscode latents`: which latents a text activates."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from crosscode.commands.parts.command import Command, RunOptions
from crosscode.commands.parts.libraries import quiet_libraries


class Options(RunOptions):
    text: str = Field(title="TEXT")
    """what the language models read"""
    chat: bool = False
    """the text is what a user says: it passes through the tokenizer's chat template"""
    n: PositiveInt = 5
    """latents shown for each token, the largest first"""


def run(options: Options) -> None:
    from crosscode.build.finished import FinishedRun
    from crosscode.commands.parts.reading import latents_of_text

    quiet_libraries()
    text = [{"role": "user", "content": options.text}] if options.chat else options.text
    run = FinishedRun(options.run_dir, options.trust_remote_code)
    found = latents_of_text(run, text)
    width = max(map(len, found.tokens))
    for position, token in enumerate(found.tokens):
        strongest = "  ".join(f"{latent}:{value:.3g}" for latent, value in found.strongest(position, options.n))
        if position == 0 and not run.config.data.keep_first_position:
            strongest += "  (training leaves out position 0)"
        print(f"{token:<{width}}  {strongest}".rstrip())


COMMAND = Command("which latents a text activates, token by token", run, Options, positional="run_dir")
