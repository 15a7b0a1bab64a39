"""Which training scheme recovers what of a planted dictionary, at the same L0.

Axes: M models · P hookpoints · D width · L latents.
"""

from __future__ import annotations

import math
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosscode.build.data import available_device
from crosscode.build.experiment import check_backend
from crosscode.errors import CrosscodeError, InputError, Interrupted
from crosscode.evaluation.heldout import EvaluationResult, measure_reconstruction
from crosscode.models.architecture import split_for
from crosscode.runs.directory import RunDirectory
from crosscode.synthetic.config import SyntheticConfig
from crosscode.synthetic.ground_truth import GroundTruth, compare_with_planted
from crosscode.synthetic.planted import PlantedDictionary, SyntheticActivations
from crosscode.synthetic.scheme import SyntheticScheme
from crosscode.trainers.constraints import constraints_for
from crosscode.trainers.trainer import Trainer

MATCHED_WITHIN = 0.05
"""An L0 this close to the wanted one, as a share of it, is not improved further."""


@dataclass(frozen=True)
class SyntheticResult:
    """One row of the table. `penalty` is the factor on the sparsity penalty that was used, `n_runs` how many runs it
    took to find; both None for TopK styles, which have no such penalty."""

    scheme: str
    fvu: float
    l0: float
    dead_fraction: float
    tokens_per_s: float
    step_ms: float
    """mean time of a training step, without its activations"""
    ground_truth: GroundTruth
    penalty: float | None = None
    n_runs: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN where a figure is not defined, which `json_text` writes as null."""
        return asdict(self)


def run_synthetic(config: SyntheticConfig, *, progress: bool = False) -> Iterator[SyntheticResult]:
    """Train each scheme on the same activations and compare its decoder with what was planted.

    Raises:
        InputError: at once, for whatever cannot be trained or compared.
    """
    dictionary = PlantedDictionary(config.planted)
    device = available_device(config.device)
    if config.backend != "auto":
        check_backend(config.backend, device)
    planted = config.planted
    for name in config.schemes:
        scheme = SyntheticScheme.of(config, name)
        if scheme.n_latents < planted.n_features:
            raise InputError(
                f"n_latents = {scheme.n_latents}: at least one for each of the {planted.n_features} planted features"
            )
        model = scheme.model((planted.n_models, planted.n_hookpoints, planted.d_model), config.backend)
        scheme.objective().check_model(model)
        model.check_init(scheme.init())
    return (_best_run(name, config, dictionary, progress) for name in config.schemes)


def _best_run(name: str, config: SyntheticConfig, dictionary: PlantedDictionary, progress: bool) -> SyntheticResult:
    """The run whose L0 is nearest to the wanted one."""
    wanted, runs = config.wanted_l0(), list[tuple[float, float]]()
    best, best_miss, penalty = None, math.inf, config.penalty
    for _ in range(config.max_runs):
        result = _run_scheme(SyntheticScheme.of(config, name, penalty), config, dictionary, progress)
        if result.penalty is None:
            return result
        runs.append((penalty, max(result.l0, 1e-3)))
        miss = abs(math.log(runs[-1][1] / wanted))
        if miss < best_miss:
            best, best_miss = result, miss
        if miss < MATCHED_WITHIN:
            break
        penalty = next_penalty(runs, wanted)
    assert best is not None
    return replace(best, n_runs=len(runs))


def next_penalty(runs: list[tuple[float, float]], wanted: float) -> float:
    """Where to look next, given `(penalty, l0)` of the runs so far: L0 falls with the penalty, so on the line (in
    logarithms) between the nearest runs on either side of the wanted L0, or beyond them if all lie on one side."""
    above = [(l0, penalty) for penalty, l0 in runs if l0 > wanted]
    below = [(l0, penalty) for penalty, l0 in runs if l0 <= wanted]
    if not (above and below):
        penalty, l0 = runs[-1]
        return penalty * min(max((l0 / wanted) ** 1.5, 0.2), 5.0)
    (high_l0, low_penalty), (low_l0, high_penalty) = min(above), max(below)
    share = math.log(high_l0 / wanted) / math.log(high_l0 / low_l0)
    return low_penalty * (high_penalty / low_penalty) ** min(max(share, 0.1), 0.9)


def _run_scheme(
    scheme: SyntheticScheme, config: SyntheticConfig, dictionary: PlantedDictionary, progress: bool
) -> SyntheticResult:
    with tempfile.TemporaryDirectory(prefix="crosscode-synthetic-") as folder:
        run = RunDirectory(Path(folder) / scheme.name)
        run.create("")
        trainer = build_synthetic_trainer(scheme, config, dictionary, run, progress=progress)
        started = time.perf_counter()
        try:
            evaluation = trainer.train()
        except Interrupted as error:  # the run lies in a temporary folder: there is nothing to go on from
            if error.signal is not None:
                signal.raise_signal(signal.Signals[error.signal])
            raise CrosscodeError(f"synthetic: {scheme.name} was interrupted; nothing of it is kept") from error
        seconds = time.perf_counter() - started
    assert isinstance(evaluation, EvaluationResult)
    decoder_LMPD = trainer.model.W_dec_LXoDo.detach().cpu()
    truth = compare_with_planted(
        dictionary.directions_FMPD, dictionary.model_F, decoder_LMPD, config.exclusive_threshold
    )
    return SyntheticResult(
        scheme.name,
        evaluation.fvu,
        evaluation.l0,
        evaluation.dead_fraction,
        config.n_steps * config.batch_size / seconds,
        1e3 * trainer.phases.total_s["step"] / config.n_steps,
        truth,
        penalty=scheme.penalty if scheme.is_penalised else None,
    )


def build_synthetic_trainer(
    scheme: SyntheticScheme,
    config: SyntheticConfig,
    dictionary: PlantedDictionary,
    run: RunDirectory,
    *,
    progress: bool = False,
) -> Trainer:
    """The same `Trainer` as for language models, on synthetic activations."""
    device = available_device(config.device)
    data = SyntheticActivations(dictionary, config.batch_size, seed=config.seed, device=device)
    split = split_for("model_hookpoint_acausal")
    model = scheme.model(data.dims, config.backend).to(device)
    constraints = constraints_for(model)
    calibration = SyntheticActivations(dictionary, config.batch_size, seed=config.seed + 1, device=device)
    model.init_weights(
        scheme.init(), config.seed, samples=lambda: (split.activations(acts_BMPD) for acts_BMPD in calibration)
    )
    for constraint in constraints:
        constraint.start(model)
    n_models, n_hookpoints, _ = data.dims
    position_names = [f"model {m}, hookpoint {p}" for m in range(n_models) for p in range(n_hookpoints)]

    def heldout() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(config.seed + 999_999_937)
        for start in range(0, config.n_heldout_tokens, 4096):
            yield dictionary.sample(min(4096, config.n_heldout_tokens - start), generator)[0]

    return Trainer(
        model,
        data,
        split,
        scheme.objective(),
        scheme.train_config(config),
        run,
        [],
        position_names=position_names,
        constraints=constraints,
        evaluate=lambda trained, scaling_MP: measure_reconstruction(
            trained, heldout(), split, position_names, scaling_MP
        ),
        progress=progress,
    )


def markdown_table(results: list[SyntheticResult]) -> str:
    """The results as a table for people."""
    head = "| scheme | L0 | FVU | dead | cos all | cos shared | cos exclusive | max cos | precision | recall |"
    rows = [head, "|---|" + "---:|" * (head.count("|") - 2)]
    for result in results:
        truth = result.ground_truth
        groups = [
            group.matched_cosine if group else float("nan") for group in (truth.all, truth.shared, truth.exclusive)
        ]
        numbers = [result.fvu, result.dead_fraction, *groups, truth.all.mean_max_cosine, truth.precision, truth.recall]
        shown = ("-" if math.isnan(number) else f"{number:.3f}" for number in numbers)
        rows.append(f"| {result.scheme} | {result.l0:.1f} | " + " | ".join(shown) + " |")
    return "\n".join(rows)
