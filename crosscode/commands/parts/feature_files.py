"""Feature files of a run, from the records that the report shows.

Axes: H sequences · S positions · N active entries · L latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crosscode.analysis.encoded import encode_heldout
from crosscode.analysis.example_pool import Example
from crosscode.analysis.latents_frame import latents_frame
from crosscode.analysis.latents_pass import LatentsPass
from crosscode.analysis.records import LatentRecords, LogitEnds, study_records
from crosscode.analysis.tokens import TokenDisplay
from crosscode.build.arrays import NumberTokenizer
from crosscode.build.finished import FinishedRun
from crosscode.build.heldout import AnyExperiment
from crosscode.commands.parts.reading import displays_of, unembeds_of
from crosscode.config.arrays import ArraysSource
from crosscode.config.hookpoints import layer_of
from crosscode.errors import InputError
from crosscode.files import check_can_be_made, check_may_be_filled, new_folder
from crosscode.interop.feature_files import INDEX, TABLE, cantor, write_dataset, write_delphi, write_index, write_layer
from crosscode.interop.hub import hub_names
from crosscode.trainers.progress import Progress


def write_features(run: FinishedRun, to: str, out: Path, layer: int | None, n_tokens: int | None) -> Path:
    """Write them into a new folder; the file or folder to hand to the tool.

    Raises:
        InputError: no text, latents of several layers for circuit-tracer, or an unknown layer.
    """
    experiment, model = _experiment_with_text(run), run.model
    if to == "delphi":
        return _delphi(run, out, n_tokens)
    write = None if to == "dataset" else circuit_tracer_writer(run, out, layer)
    batches = _heldout(run, n_tokens)
    names, shows = experiment.output_names(), displays_of(experiment)
    study, records = study_records(model, batches, experiment.split, names, unembeds_of(experiment), displays=shows)
    if write is not None:
        return write(study, records)
    rows = list(dataset_rows(study, records, experiment.tokenizer))
    with new_folder(out, TABLE) as folder:
        write_dataset(folder, rows, run.config.name, hub_names(model.path for model in run.config.language_models))
    return out / TABLE


def _heldout(run: FinishedRun, n_tokens: int | None) -> Iterator[Any]:
    """Batches of held-out text, counted where they are used."""
    with Progress(n_tokens or run.config.evaluation.n_tokens, what="features", unit="token") as shown:
        yield from shown.through(run.experiment.heldout_batches(n_tokens))


def _experiment_with_text(run: FinishedRun) -> AnyExperiment:
    """On language models, or on activations that came with tokens and a tokenizer (then there are no logits)."""
    if isinstance(run.experiment.tokenizer, NumberTokenizer):
        raise InputError(
            "features: this run has no text: give crosscode.train tokens= and tokenizer= beside the activations"
        )
    return run.experiment


def check_out(out: Path, field: str) -> None:
    """Raise `InputError` unless a new folder can be made there."""
    check_may_be_filled(out, field)
    check_can_be_made(out, field)
    if out.exists():
        raise InputError(f"{field}: {str(out)!r} is there already; name a new folder")


def circuit_tracer_writer(
    run: FinishedRun, out: Path, layer: int | None = None
) -> Callable[[LatentsPass, LatentRecords], Path]:
    """What writes circuit-tracer's files of a pass over the held-out text.

    Raises:
        InputError: no text, or no or another layer; before anything is read.
    """
    tokenizer, layers = _experiment_with_text(run).tokenizer, _layers(run, layer)

    def write(study: LatentsPass, records: LatentRecords) -> Path:
        with new_folder(out / "features", INDEX) as folder:
            entries, first = {}, 0
            for layer, part in zip(layers, run.model.parts, strict=True):
                latents = range(first, first + part.n_latents)
                found = feature_records(study, records, tokenizer, layer, str(run.path), latents)
                entries[layer], first = write_layer(folder, layer, found), latents.stop
            write_index(folder, entries)
        return out / "features" / INDEX

    return write


def _layers(run: FinishedRun, layer: int | None) -> list[int]:
    """The layer of each part of the model: that of what it reads."""
    n_parts = len(run.model.parts)
    if layer is not None and n_parts > 1:
        raise InputError(f"layer = {layer}: this model has latents of {n_parts} layers, which its hookpoints name")
    hookpoints = _hookpoints(run)[:n_parts]
    return [_layer_of(hookpoint) for hookpoint in hookpoints] if layer is None else [layer]


def _hookpoints(run: FinishedRun) -> list[str]:
    """Of activations that were given the names of their positions, without those of models."""
    source = run.config.data.source
    names = source.names[0] if isinstance(source, ArraysSource) else run.config.hookpoints
    return [name.rpartition("/")[2] for name in names]


def _layer_of(hookpoint: str) -> int:
    layer = layer_of(hookpoint)
    if layer is None:
        raise InputError(f"layer: hookpoint {hookpoint!r} names none; give --layer")
    return layer


def feature_records(
    study: LatentsPass, records: LatentRecords, tokenizer: Any, layer: int, name: str, latents: range
) -> Iterator[dict[str, Any]]:
    """circuit-tracer's record of each of a layer's latents, in order. Logits are of the last output position that a latent
    writes to. `quantile_values` are the 100 percentiles of what is above 0; bins of the `histogram` end at `act_max`, as its
    page draws them."""
    text = TokenDisplay(tokenizer).text

    def shown(example: Example) -> dict[str, Any]:
        return {
            "tokens": [text(token) for token in example.tokens],
            "tokens_acts_list": example.strengths,
            "train_token_ind": example.peak,
            "is_repeated_datapoint": False,
        }

    for latent in latents:
        ends = next((one for one in reversed(records.logits.values()) if bool(one.writes_L[latent])), None)
        of_logit = text if ends is None or ends.display is None else ends.display.text
        counts_N = records.histograms.counts_LN[latent]
        upper = float(records.histograms.upper_L[latent])
        within_N = counts_N.cumsum() / max(int(counts_N.sum()), 1)
        percentiles = (np.searchsorted(within_N, np.arange(1, 101) / 100) + 1) * upper / len(counts_N)
        yield {
            "transcoder_id": name,
            "index": cantor(layer, latent - latents.start),
            "examples_quantiles": [
                {"quantile_name": title, "examples": [shown(one) for one in some]}
                for title, some in study.examples(latent).items()
                if some
            ],
            "top_logits": [] if ends is None else [of_logit(token) for token in ends.top_id_LE[latent].tolist()],
            "bottom_logits": [] if ends is None else [of_logit(token) for token in ends.bottom_id_LE[latent].tolist()],
            "act_min": 0.0,
            "act_max": float(study.firing.max_L[latent]),
            "quantile_values": percentiles.tolist(),
            "histogram": np.trim_zeros(counts_N, "b").tolist(),
            "activation_frequency": float(study.firing.density_L[latent]),
        }


def dataset_rows(study: LatentsPass, records: LatentRecords, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """A row for each latent: those of `Run.table()`, then lists of examples, logits and neighbours."""
    text = TokenDisplay(tokenizer).text

    def ends(of: LogitEnds, token_LE: torch.Tensor, value_LE: torch.Tensor, latent: int) -> list[dict[str, Any]]:
        pairs = zip(token_LE[latent].tolist(), value_LE[latent].tolist(), strict=True)
        own = text if of.display is None else of.display.text
        return [{"token": own(token), "logit": value} for token, value in pairs]

    for latent, row in enumerate(latents_frame(study).to_dict("records")):
        yield {
            "latent": latent,
            **row,
            "examples": [
                {
                    "share": title,
                    "tokens": [text(token) for token in example.tokens],
                    "activations": example.strengths,
                    "peak": example.peak,
                }
                for title, some in study.examples(latent).items()
                for example in some
            ],
            "histogram": records.histograms.counts_LN[latent].tolist(),
            "histogram_upper": float(records.histograms.upper_L[latent]),
            "logits": [
                {
                    "position": name,
                    "top": ends(one, one.top_id_LE, one.top_LE, latent),
                    "bottom": ends(one, one.bottom_id_LE, one.bottom_LE, latent),
                }
                for name, one in records.logits.items()
                if bool(one.writes_L[latent])
            ],
            "nearest_by_decoder": [{"latent": o, "similarity": v} for o, v in records.by_decoder.of(latent)],
            "nearest_by_firing": [{"latent": o, "similarity": v} for o, v in records.by_firing.of(latent)],
        }


def _delphi(run: FinishedRun, out: Path, n_tokens: int | None) -> Path:
    """A cache of each part's latents. Of one part it has the name of the last hookpoint, of several that of what they read."""
    experiment, model = _experiment_with_text(run), run.model
    parts, hooks = model.parts, _hookpoints(run)
    models = run.config.language_models
    tokens, locations, values = [], [], []
    for batch in encode_heldout(model, _heldout(run, n_tokens), experiment.split):
        entries, length = batch.entries, batch.tokens_HS.shape[1]
        place_N = batch.position_B.to(entries.token_N.device)[entries.token_N]
        sequence_N = place_N // length + batch.first_sequence
        locations.append(torch.stack([sequence_N, place_N % length, entries.latent_N], 1).cpu().numpy())
        values.append(entries.value_N.float().cpu().numpy())
        tokens.append(batch.tokens_HS.cpu().numpy())
    location_N3, value_N, tokens_HS = np.concatenate(locations), np.concatenate(values), np.concatenate(tokens)
    modules, first = [hooks[-1]] if len(parts) == 1 else hooks[: len(parts)], 0
    for module, part in zip(modules, parts, strict=True):
        config = {
            "model_name": models[-1].path if models else getattr(experiment.tokenizer, "name_or_path", ""),
            "ctx_len": tokens_HS.shape[1],
            "n_tokens": tokens_HS.size,
            "hookpoint": module,
            "n_latents": part.n_latents,
        }
        own_N = (location_N3[:, 2] >= first) & (location_N3[:, 2] < first + part.n_latents)
        with new_folder(out / module, "config.json") as folder:
            own_N3 = location_N3[own_N] - np.array([0, 0, first])
            write_delphi(folder, own_N3, value_N[own_N], tokens_HS, part.n_latents, config)
        first += part.n_latents
    return out
