"""Every recipe, for a few steps on the embedded language models: same config, less of everything."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from functools import cache

import pytest
import torch

from crosscode.build.experiment import open_experiment
from crosscode.build.run import build_trainer
from crosscode.build.schema import check_config, load_config, read_yaml
from crosscode.models import BaseCrosscoder
from crosscode.recipes import recipe_names, recipe_path

OF_THE_SCHEMES = {
    "l1_crosscoder", "topk_crosscoder", "batch_topk_crosscoder", "groupmax_crosscoder", "jan_update_crosscoder",
    "feb_update_diffing_jumprelu", "feb_update_diffing_topk", "dedicated_feature_crosscoder", "delta_crosscoder", "diff_sae",
    "l1_cross_layer_transcoder",
    "topk_cross_layer_transcoder", "batch_topk_cross_layer_transcoder", "groupmax_cross_layer_transcoder",
    "topk_cross_layer_skip_transcoder", "batch_topk_cross_layer_skip_transcoder",
    "groupmax_cross_layer_skip_transcoder", "jumprelu_cross_layer_transcoder", "compound_clt", "skip_transcoder",
    "sae_l1", "sae_topk", "sae_batch_topk", "sae_groupmax", "sae_jumprelu", "three_model_crosscoder",
    "wanted_l0_crosscoder", "wanted_l0_sae", "matryoshka_sae", "matryoshka_crosscoder", "matryoshka_transcoder",
    "matryoshka_clt",
}  # fmt: skip
ON_EMBEDDED_MODELS = [name for name in recipe_names() if "smollm" not in name]


@cache
def _some_text() -> str:
    """A little of the embedded corpus, so that a test need not prepare all of it."""
    from crosscode.demo.corpus import demo_documents

    return "\n\n".join(document.text for document in demo_documents("train", ("code",))[:3])


@pytest.fixture
def shrink(tmp_path):
    """A recipe with less data, smaller buffers and a run directory of its own."""

    def make(name: str):
        parts = [json.dumps({"text": part}) for part in _some_text().split("\n\n")]
        for split, lines in (("train", parts[1::2]), ("heldout", parts[::2])):
            (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
        values = read_yaml(name)
        values["run_dir"] = str(tmp_path / "run")
        values["device"] = "cpu"
        values["data"] |= {
            "source": {"type": "local", "path": str(tmp_path / "train.jsonl")},
            "heldout": {"type": "local", "path": str(tmp_path / "heldout.jsonl")},
            "sequence_length": 32, "harvest_batch_size": 8,
            "shuffle_buffer_size": 64, "n_tokens_for_norm_estimate": 64,
        }  # fmt: skip
        if "n_calibration_tokens" not in str(values["crosscoder"]["init"]) and "jan" in str(
            values["crosscoder"]["init"]
        ):
            inner = values["crosscoder"]["init"].get("first", values["crosscoder"]["init"])
            inner["n_calibration_tokens"] = 128
        if values["crosscoder"]["init"]["type"] == "zero_dec_skip":
            values["crosscoder"]["init"]["n_mean_tokens"] = 128
        values["train"] |= {"n_tokens": 64 * 4, "batch_size": 64, "log_every": 4}
        values["evaluation"] = {"n_tokens": 128}
        return check_config(values)

    return make


def test_there_is_a_recipe_for_every_scheme():
    assert set(recipe_names()) >= OF_THE_SCHEMES


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_a_checked_config_with_a_title(name):
    path = recipe_path(name)
    assert path is not None
    title = path.read_text(encoding="utf-8").splitlines()[0]
    assert title.startswith("# ") and 10 < len(title) <= 120
    assert load_config(name).name == name


@pytest.mark.parametrize("name", ON_EMBEDDED_MODELS)
def test_a_recipe_trains_evaluates_and_loads_again(name, shrink, reads, monkeypatch):
    torch.set_num_threads(1)
    config = shrink(name)
    experiment = open_experiment(config)
    trainer = build_trainer(experiment, progress=False)
    before = {key: param.detach().clone() for key, param in trainer.model.named_parameters()}
    train_step = trainer.train_step

    def watched(acts_BMPD):
        with reads if trainer.step < 3 else nullcontext():
            train_step(acts_BMPD)

    monkeypatch.setattr(trainer, "train_step", watched)
    evaluation = trainer.train()
    assert reads.n == 0, "steps that do not log read nothing from the device"
    assert evaluation is not None and math.isfinite(evaluation.fvu) and evaluation.l0 >= 0
    assert trainer.step == 4
    names = (
        ["tuned - base/" + hook for hook in config.hookpoints]
        if name == "diff_sae"
        else [f"{lm.short_name()}/{hook}" for lm in config.language_models for hook in config.hookpoints]
    )
    assert list(evaluation.fvu_by_position) == names[-len(evaluation.fvu_by_position) :]
    assert len(evaluation.fvu_by_position) == math.prod(trainer.model.out_dims)
    moved = [key for key, param in trainer.model.named_parameters() if not torch.equal(param, before[key])]
    assert set(before) - set(moved) <= {"activation_fn.log_threshold_L"}, "every parameter takes part in training"
    loaded = BaseCrosscoder.load(config.run_path() / "final")
    acts_BMPD = next(experiment.heldout_activations())
    input_BXiDi, _ = experiment.split.activations(acts_BMPD)
    assert torch.equal(loaded(input_BXiDi), trainer.model(input_BXiDi))
