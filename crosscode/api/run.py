"""A run, from Python: what `crosscode.train` and `crosscode.open` return.

Axes: S positions of a text · L latents · X output positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crosscode.analysis.encoded import active_entries
from crosscode.analysis.examples import Example
from crosscode.analysis.latents_pass import LatentsPass, study_latents
from crosscode.analysis.metrics_file import read_metrics
from crosscode.analysis.tokens import DisplayToken, TokenDisplay
from crosscode.api.given import given_arrays
from crosscode.build.experiment import Experiment, open_experiment
from crosscode.build.finished import FinishedRun
from crosscode.build.resume import ResumePoint
from crosscode.build.run import build_trainer
from crosscode.commands.report import report_run
from crosscode.data.harvest.language_models import LanguageModel
from crosscode.errors import InputError

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class TextLatents:
    """Latents of one text."""

    tokens: list[str]
    """S tokens as text"""
    token_ids: list[int]
    values_SL: Tensor
    """sparse CSR, float32, on the CPU"""

    def strongest(self, position: int, n: int = 10) -> list[tuple[int, float]]:
        """`(latent, activation)` of the largest latents at a position."""
        row_L = self.values_SL[position]
        order = row_L.values().argsort(descending=True)[:n]
        return [(int(row_L.indices()[0, i]), float(row_L.values()[i])) for i in order]


@dataclass(frozen=True)
class ShownExample:
    """A place where a latent is active, with the text around it."""

    example: Example
    shown: list[DisplayToken]

    @property
    def activation(self) -> float:
        return self.example.value

    @property
    def text(self) -> str:
        """The text around, the peak in « »."""
        return "".join(f"«{token.text}»" if token.is_peak else token.text for token in self.shown)

    def __str__(self) -> str:
        return f"{self.activation:8.3f}  {self.text}"


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
        return read_metrics(self.directory.metrics_file).rows

    def report(self, n_tokens: int | None = None, csv: str | Path | None = None) -> Path:
        """Write `report.html`; its path.

        Args:
            n_tokens: held-out activations to look at; default: as configured.
            csv: also write the table of the first pair of positions there.
        """
        return report_run(self, n_tokens, None if csv is None else Path(csv))

    # ---- latents

    @property
    def language_models(self) -> list[LanguageModel]:
        """The models whose activations the run reads; `model` of each is the one of `transformers`."""
        return list(self._text_experiment("language_models").harvester.models)

    def latents(self, text: str) -> TextLatents:
        """Latents at every token of a text, the beginning-of-sequence token included where training had one.

        Raises:
            InputError: the run has no language models; no text; a text that is longer than they take.
        """
        experiment = self._text_experiment("latents(text)")
        tokenizer, harvester, data = experiment.tokenizer, experiment.harvester, self.config.data
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if data.bos != "none" and tokenizer.bos_token_id is not None:
            ids.insert(0, tokenizer.bos_token_id)
        limit = harvester.max_sequence_length
        if not ids or (limit is not None and len(ids) > limit):
            raise InputError(f"text: {len(ids)} tokens: must be at least 1, at most {limit or 'as memory allows'}")
        acts_SMPD = harvester.harvest(torch.tensor([ids]))[0].float().to(self.model.device)
        with torch.no_grad():
            entries = active_entries(self.model.encode_latents(experiment.split.activations(acts_SMPD)[0]))
        index_2N = torch.stack([entries.token_N, entries.latent_N]).cpu()
        size = (len(ids), entries.n_latents)
        values_SL = torch.sparse_coo_tensor(
            index_2N, entries.value_N.float().cpu(), size, check_invariants=True
        ).to_sparse_csr()
        display = TokenDisplay(tokenizer)
        shown = [display([token_id], [0.0])[0].text for token_id in ids]
        return TextLatents(shown, ids, values_SL)

    def top(self, latent: int, n: int = 8) -> list[ShownExample]:
        """Where a latent is largest on held-out text, strongest first (of own activations without tokens: row numbers).

        The first call reads the held-out text once, for all latents.

        Args:
            n: at most 8.
        """
        if not 0 <= latent < self.model.n_latents:
            raise InputError(f"latent = {latent}: must be between 0 and {self.model.n_latents - 1}")
        display = TokenDisplay(self.experiment.tokenizer)
        found = self._study.top.examples(latent)[:n]
        return [ShownExample(one, display(one.tokens, one.strengths, one.peak)) for one in found]

    def table(self) -> pandas.DataFrame:
        """A row for each latent: how often and how strongly it fires on held-out text, the norm of its decoder vector at
        each position (in the scale of training), and for each pair of positions that is compared how they differ."""
        import pandas

        study = self._study
        firing = study.firing
        columns: dict[str, Any] = {
            "latent": range(self.model.n_latents),
            "firings": firing.counts_L,
            "density": firing.density_L,
            "mean_active": firing.mean_active_L,
            "max_activation": firing.max_L,
        }
        columns |= {f"decoder_norm {name}": study.decoder_norm_LX[:, x] for x, name in enumerate(study.position_names)}
        for pair in study.pairs:
            of_pair = f" {pair.name_a} | {pair.name_b}" if len(study.pairs) > 1 else ""
            names = ("relative_norm", "decoder_cosine", "encoder_cosine", "tag", "nu_error", "nu_reconstruction")
            columns |= {name + of_pair: getattr(pair, name) for name in names}
        plain = {name: one.numpy() if isinstance(one, Tensor) else list(one) for name, one in columns.items()}
        return pandas.DataFrame(plain).set_index("latent")

    # ---- going on

    def resume(self, acts: Any = None, *, progress: bool = True, callbacks: Any = (), **given: Any) -> Run:
        """Go on from the newest checkpoint, to the bit as if nothing had been.

        Args:
            acts: for a run on activations that no file holds: the same again; with them `heldout`, `tokens`,
                `tokenizer` as in `crosscode.train`, if the run has no checkpoint yet.
            callbacks: as of `crosscode.train`.

        Raises:
            InputError: nothing to go on from, another source, or one that has no position.
        """
        point = ResumePoint.find(self.path)
        arrays = None if acts is None else given_arrays(acts, **given)
        experiment = open_experiment(point.config, arrays=arrays)
        build_trainer(experiment, resume=point, callbacks=callbacks, progress=progress).train()
        return Run(self.path)

    # ---- parts

    @cached_property
    def _study(self) -> LatentsPass:
        experiment = self.experiment
        return study_latents(self.model, experiment.heldout_batches(), experiment.split, experiment.output_names())

    def _text_experiment(self, asked: str) -> Experiment:
        if not isinstance(self.experiment, Experiment):
            raise InputError(f"{asked}: this run is on activations that were given, so that it knows no language model")
        return self.experiment
