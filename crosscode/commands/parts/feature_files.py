"""Feature files of a run, from the records that the report shows.

Axes: H sequences · S positions · N active entries · L latents.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crosscode.analysis.encoded import encode_heldout
from crosscode.analysis.examples import Example
from crosscode.analysis.latents_pass import LatentsPass
from crosscode.analysis.records import LatentRecords, study_records
from crosscode.analysis.tokens import TokenDisplay
from crosscode.build.finished import FinishedRun
from crosscode.commands.parts.reading import text_experiment, unembed_of
from crosscode.errors import InputError
from crosscode.files import new_folder
from crosscode.interop.feature_files import cantor, write_delphi, write_index, write_layer

_QUANTILES = ("Top activations", "Quarter 1", "Quarter 2", "Quarter 3", "Quarter 4")


def write_features(run: FinishedRun, to: str, out: Path, layer: int | None, n_tokens: int | None) -> Path:
    """Write them into a new folder; the file or folder to hand to the tool.

    Raises:
        InputError: no language models, latents of several layers for circuit-tracer, or an unknown layer.
    """
    experiment = text_experiment(run, "features")
    model = run.model
    if to == "delphi":
        return _delphi(run, out, n_tokens)
    if len(model.parts) > 1:
        raise InputError(f"to = circuit-tracer: latents of {len(model.parts)} layers in one model are not written yet")
    layer = _layer_of(run.config.hookpoints[0]) if layer is None else layer
    names = experiment.output_names()
    batches = experiment.heldout_batches(n_tokens)
    study, records = study_records(model, batches, experiment.split, names, unembed_of(experiment))
    with new_folder(out / "features", "index.json.gz") as folder:
        entry = write_layer(folder, layer, feature_records(study, records, experiment.tokenizer, layer, str(run.path)))
        write_index(folder, {layer: entry})
    return out / "features" / "index.json.gz"


def _layer_of(hookpoint: str) -> int:
    found = re.search(r"\.(\d+)\.", hookpoint)
    if found is None:
        raise InputError(f"layer: hookpoint {hookpoint!r} names none; give --layer")
    return int(found[1])


def feature_records(
    study: LatentsPass, records: LatentRecords, tokenizer: Any, layer: int, name: str
) -> Iterator[dict[str, Any]]:
    """circuit-tracer's record of each latent, in order. Logits are of the last output position that has any."""
    display = TokenDisplay(tokenizer)
    ends = list(records.logits.values())[-1] if records.logits else None

    def text(token: int) -> str:
        return display([token], [0.0])[0].text

    def shown(example: Example) -> dict[str, Any]:
        return {
            "tokens": [text(token) for token in example.tokens],
            "tokens_acts_list": example.strengths,
            "train_token_ind": example.peak,
            "is_repeated_datapoint": False,
        }

    for latent in range(study.decoder_norm_LX.shape[0]):
        shares = [study.top.examples(latent), *study.quantiles.examples(latent, n_quantiles=4, per_quantile=2)]
        counts_N = records.histograms.counts_LN[latent]
        upper = float(records.histograms.upper_L[latent])
        within_N = counts_N.cumsum() / max(int(counts_N.sum()), 1)
        quantiles = [float(np.searchsorted(within_N, q) + 1) * upper / len(counts_N) for q in (0.25, 0.5, 0.75)]
        yield {
            "transcoder_id": name,
            "index": cantor(layer, latent),
            "examples_quantiles": [
                {"quantile_name": title, "examples": [shown(one) for one in some]}
                for title, some in zip(_QUANTILES, shares, strict=True)
                if some
            ],
            "top_logits": [] if ends is None else [text(token) for token in ends.top_id_LE[latent].tolist()],
            "bottom_logits": [] if ends is None else [text(token) for token in ends.bottom_id_LE[latent].tolist()],
            "act_min": 0.0,
            "act_max": float(study.firing.max_L[latent]),
            "quantile_values": quantiles,
            "histogram": counts_N.tolist(),
            "activation_frequency": float(study.firing.density_L[latent]),
        }


def _delphi(run: FinishedRun, out: Path, n_tokens: int | None) -> Path:
    experiment = text_experiment(run, "features")
    tokens, locations, values, module = [], [], [], run.config.hookpoints[-1]
    for batch in encode_heldout(run.model, experiment.heldout_batches(n_tokens), experiment.split):
        entries, length = batch.entries, batch.tokens_HS.shape[1]
        place_N = batch.position_B.to(entries.token_N.device)[entries.token_N]
        sequence_N = place_N // length + batch.first_sequence
        locations.append(torch.stack([sequence_N, place_N % length, entries.latent_N], 1).cpu().numpy())
        values.append(entries.value_N.float().cpu().numpy())
        tokens.append(batch.tokens_HS.cpu().numpy())
    config = {
        "model_name": experiment.harvester.models[-1].name,
        "ctx_len": tokens[0].shape[1],
        "n_tokens": int(sum(one.size for one in tokens)),
        "hookpoint": module,
        "n_latents": run.model.n_latents,
    }
    with new_folder(out / module, "config.json") as folder:
        write_delphi(
            folder,
            np.concatenate(locations),
            np.concatenate(values),
            np.concatenate(tokens),
            run.model.n_latents,
            config,
        )
    return out / module
