"""A run, from Python: what `crosscode.train` and `crosscode.open` return.

Axes: S positions of a text · L latents · X output positions.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosscode.analysis.latents_frame import latents_frame
from crosscode.analysis.latents_pass import LatentsPass, study_latents
from crosscode.analysis.metrics_file import read_metrics
from crosscode.analysis.tokens import TokenDisplay
from crosscode.analysis.verdict import Verdict
from crosscode.api.given import given_arrays
from crosscode.build.experiment import open_experiment
from crosscode.build.finished import FinishedRun
from crosscode.build.resume import ResumePoint
from crosscode.build.run import build_trainer
from crosscode.commands.parts.closing import closes_of
from crosscode.commands.parts.reading import (
    LatentLogits,
    ShownExample,
    TextLatents,
    latents_of_text,
    logits_of_latent,
    text_experiment,
)
from crosscode.commands.parts.steering import Model, Models, Steered, ablation, check_latent, compare_steered, steering
from crosscode.commands.report import report_run
from crosscode.data.harvest.language_models import LanguageModel
from crosscode.data.text.prompts import Prompt
from crosscode.errors import InputError
from crosscode.evaluation.closes import Closes
from crosscode.evaluation.intervention import Positions

if TYPE_CHECKING:
    import pandas


log = logging.getLogger("crosscode")


class Run(FinishedRun):
    """A run directory, read when something is first asked for. See also `path`, `config`, `experiment`.

    Raises:
        InputError: no run there; later, for what it has not (yet).
    """

    def __repr__(self) -> str:
        state = "finished" if self.directory.is_finished() else "not over"
        return f"Run({str(self.path)!r}, {self.config.crosscoder.type}, {state})"

    @property
    def summary(self) -> dict[str, Any]:
        """The last figures: step, tokens, loss, fvu, fvu_by_position, l0, dead_fraction, loss_recovered, ..."""
        if not (self.path / "summary.json").is_file():
            raise InputError(f"run: {str(self.path)!r} is not over: it has no summary yet")
        return self.directory.read_summary()

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl."""
        found = read_metrics(self.directory.metrics_file)
        if found.n_unreadable:
            log.warning(
                "%s: %d lines that cannot be read are left out", self.directory.metrics_file, found.n_unreadable
            )
        return found.rows

    def report(
        self, n_tokens: int | None = None, csv: str | Path | None = None, parquet: str | Path | None = None
    ) -> Path:
        """Write `report.html`; its path.

        Args:
            n_tokens: held-out activations to look at; default: as configured.
            csv: also write `table()` there.
            parquet: as `csv`.
        """
        csv, parquet = (None if path is None else Path(path) for path in (csv, parquet))
        return report_run(self, n_tokens, csv, latents_parquet=parquet)

    # ---- latents

    @property
    def language_models(self) -> list[LanguageModel]:
        """The models whose activations the run reads; `model` of each is the one of `transformers`."""
        return list(text_experiment(self, "language_models").harvester.models)

    def latents(self, text: Prompt) -> TextLatents:
        """Latents at every token of a text, the beginning-of-sequence token included where training had one.

        Args:
            text: or the messages of a chat, which pass through the tokenizer's chat template.

        Raises:
            InputError: the run has no language models; no text; a text that is longer than they take.
        """
        return latents_of_text(self, text)

    def logits(self, latent: int) -> dict[str, LatentLogits]:
        """What a latent writes, as logits, by name of the output position: its decoder vector there (raw, of the folded
        model), passed through the final norm and the unembedding of that position's language model. Positions to which the
        latent cannot write, or which are not in the residual stream, are left out.

        Raises:
            InputError: no such latent, no language models, or no hookpoint in a residual stream.
        """
        check_latent(self, latent)
        return logits_of_latent(self, latent)

    def top(self, latent: int, n: int = 8) -> list[ShownExample]:
        """Where a latent is largest on held-out text, strongest first. Own activations without tokens give row numbers.

        The first call reads the held-out text once, for all latents.

        Args:
            n: at most 8.
        """
        check_latent(self, latent)
        display = TokenDisplay(self.experiment.tokenizer)
        found = self._study.top.examples(latent)[:n]
        return [ShownExample(one, display(one.tokens, one.strengths, one.peak)) for one in found]

    def table(self) -> pandas.DataFrame:
        """A row for each latent, by its number: how often and how strongly it fires on held-out text, the norm of its decoder
        vector at each position (in the scale of training), and for each pair of positions that is compared how they
        differ. See `crosscode.analysis.latents_frame` for the columns."""
        return latents_frame(self._study)

    @property
    def verdicts(self) -> list[Verdict]:
        """What `crosscode report` says of each two models that are compared (of one model: of its first and last output
        hookpoint). `headline()` is the sentence; `names` and `why` are there for each latent. `ranking("tuned")` lists the
        latents that lean to that model, those that are specific to it first; `specific("tuned")` lists only these."""
        return self._study.verdicts

    @property
    def verdicts_by_group(self) -> Mapping[str, Mapping[str, list[Verdict]]]:
        """`verdicts` on the tokens of each group alone, where there are several: `verdicts_by_group["role"]["assistant"]`."""
        return self._study.apart

    # ---- intervening

    def steer(
        self, strengths: Mapping[int, float], models: Models = None, positions: Positions = "all"
    ) -> AbstractContextManager[None]:
        """Within the block, the run's `transformers` models run with latents added.

        At each output position `x += s * a_max * W_dec[l, position]`, with the raw decoder vector of the folded model.

        ```python
        with run.steer({12: 1.0}, models="tuned"):
            run.language_models[1].model.generate(...)
        ```

        Args:
            strengths: s by latent, in multiples of its largest activation on held-out text, `a_max`.
            models: names, numbers or `language_models`; default: all.
            positions: "all"; "prompt": the tokens that the model is given at once; "generated": those after them, with the
                cache of `generate`; or the position from which on.

        Raises:
            InputError: no such latent or model, a latent that never fires, no language models, or hookpoints that only
                TransformerBridge has.
        """
        return steering(self, strengths, models, positions)

    def ablate(
        self, latents: Iterable[int], models: Models = None, positions: Positions = "all"
    ) -> AbstractContextManager[None]:
        """Within the block, the run's `transformers` models run without what latents write: `x -= a_l * W_dec[l, position]`.
        What the crosscoder does not explain stays. `a_l` is that of the unmodified models on the same tokens: each forward
        pass runs them once more. Not for padded prompts or beam search. Arguments and errors as of `steer`.
        """
        return ablation(self, latents, models, positions)

    def compare_steered(
        self,
        prompt: Prompt,
        strengths: Mapping[int, float] | None = None,
        ablate: Sequence[int] = (),
        **options: Any,
    ) -> dict[str, Steered]:
        """What each language model writes after a prompt: as it is, with latents added or taken out, and with random
        directions of the same norms in their place. Also the next tokens that changed most.

        Args:
            prompt: a text, or the messages of a chat, which end where the answer begins.
            strengths: as of `steer`; or
            ablate: latents, as of `ablate`.
            options: `models`, `positions`, `n_tokens` (40), `samples` (0: the most probable tokens), `temperature` (1.0),
                `seed` (0), `n_changed` (8).
        """
        return compare_steered(self, prompt, strengths, ablate, **options)

    def closes(
        self,
        latents: Sequence[int] | None = None,
        model_a: Model = 0,
        model_b: Model = 1,
        *,
        n_tokens: int = 4096,
        n_random: int = 5,
        seed: int = 0,
    ) -> Closes:
        """How much of the difference between two models some latents account for: the share of `KL(B || A)` on held-out text
        that goes away when what B has of them is added to A. Random latents, with vectors of the same norms, are measured
        beside them. See `crosscode.evaluation.closes`.

        Args:
            latents: default: those that are specific to B; where there are none, the first 10 of its ranking.
            n_tokens: usable held-out tokens, in whole batches.
            n_random: draws of random latents.

        Raises:
            InputError: no crosscoder that writes to both models, or no such latents.
        """
        table = None if latents is not None else self._study
        return closes_of(self, latents, table, model_a, model_b, n_tokens=n_tokens, n_random=n_random, seed=seed)

    # ---- going on

    def resume(self, acts: Any = None, *, progress: bool = True, callbacks: Any = (), **given: Any) -> Run:
        """Go on from the newest checkpoint. The end is to the bit that of a run that never stopped.

        Args:
            acts: for a run on activations that no file holds: the same again; with them `heldout`, `tokens`,
                `tokenizer` as in `crosscode.train`, if the run has no checkpoint yet.
            callbacks: as of `crosscode.train`.

        Raises:
            InputError: nothing to go on from, another source, or one that has no position.
        """
        point = ResumePoint.find(self.path, self._trust_remote_code)
        arrays = None if acts is None else given_arrays(acts, **given)
        experiment = open_experiment(point.config, arrays=arrays)
        build_trainer(experiment, resume=point, callbacks=callbacks, progress=progress).train()
        return Run(self.path, self._trust_remote_code)

    # ---- parts

    @cached_property
    def _study(self) -> LatentsPass:
        experiment = self.experiment
        names, groupings = experiment.output_names(), experiment.groupings()
        return study_latents(self.model, experiment.heldout_batches(), experiment.split, names, groupings=groupings)
