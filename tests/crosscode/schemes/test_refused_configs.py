"""Configs that contradict themselves are refused in one line, before any language model is loaded or file written."""

from __future__ import annotations

import logging
import re

import pytest
import yaml

from crosscode.build.experiment import open_experiment
from crosscode.build.schema import check_config, read_yaml
from crosscode.commands.cli import main
from crosscode.errors import InputError


def changed(recipe, **changes):
    """A recipe with some fields replaced; `a__b` is field b of a."""
    values = read_yaml(recipe)
    # A language model that is not there: reaching it would be another error.
    for language_model in values["language_models"]:
        language_model["path"] = "/nowhere/" + language_model["path"].split(":")[-1]
    for path, value in changes.items():
        *parents, field = path.split("__")
        node = values
        for parent in parents:
            node = node[parent]
        node[field] = value
    return values


THIRD = [{"path": f"/nowhere/{name}"} for name in "abc"]
JUMPRELU_PENALTIES = {"recon": {}, "tanh": {"weight": 1.0}}


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("groupmax_crosscoder", {"crosscoder__activation__k": 33}, "k = 33: GroupMax needs a k that divides n_latents"),
        ("feb_update_diffing_topk", {"language_models": THIRD}, "shared latents need n_models = 2, got 3"),
        ("feb_update_diffing_topk", {"language_models": THIRD[:1]}, "shared latents need n_models = 2, got 1"),
        (
            "feb_update_diffing_topk",
            {"crosscoder__shared_fraction": 1.5},
            r"shared_fraction = 1.5: .*less than or equal",
        ),
        ("feb_update_diffing_jumprelu", {"crosscoder__activation": {"type": "topk", "k": 8}}, "JumpReLU"),
        (
            "topk_crosscoder",
            {"crosscoder__n_shared_latents": 5000},
            "n_shared_latents = 5000: must be between 0 and n_latents = 1024",
        ),
        ("topk_crosscoder", {"objective": JUMPRELU_PENALTIES}, "objective.tanh: a penalty of JumpReLU models"),
        ("topk_crosscoder", {"crosscoder__init": {"type": "jan_update"}}, "calibrates JumpReLU thresholds"),
        ("jan_update_crosscoder", {"crosscoder__use_encoder_bias": False}, "use 'jan_update_no_encoder_bias'"),
        (
            "topk_cross_layer_transcoder",
            {"crosscoder__init": {"type": "anthropic_transpose"}},
            "needs equal input and output spaces",
        ),
        ("topk_crosscoder", {"crosscoder__init": {"type": "identical_latents"}}, "the model has no shared latents"),
        (
            "skip_transcoder",
            {"crosscoder__init": {"type": "orthogonal_skip"}, "crosscoder__linear_skip": False},
            "no linear skip",
        ),
        (
            "feb_update_diffing_topk",
            {"crosscoder__init": {"type": "identical_latents", "first": {"type": "jan_update", "sped": 1}}},
            r"crosscoder.init.first.sped: unknown field \(value 1\)",
        ),
        (
            "feb_update_diffing_topk",
            {"crosscoder__init": {"type": "identical_latents", "first": {"type": "jan_updat"}}},
            r"init: unknown type 'jan_updat' \(did you mean 'jan_update'",
        ),
        ("compound_clt", {"crosscoder__n_latents": 1000}, "n_latents = 1000: must divide by the 3 source layers"),
        ("compound_clt", {"hookpoints": ["blocks.1.hook_mlp_out"]}, "as many output as input hookpoints"),
        ("sae_topk", {"crosscoder__activation__k_start": 8}, "activation.k_start = 8: must not be below k = 32"),
        ("topk_crosscoder", {"constraints": {"tie_shared_decoders": {}}}, "the model has no shared latents"),
        (
            "sae_topk",
            {"objective": {"recon": {}, "delta": {}}},
            "objective.delta: needs a crosscoder of at least two models",
        ),
        (
            "delta_crosscoder",
            {"language_models": THIRD[:1]},
            "objective.delta: needs a crosscoder of at least two models",
        ),
        ("diff_sae", {"language_models": THIRD[:1]}, "reads the difference of two language models, got 1"),
        ("diff_sae", {"hookpoints": ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]}, "exactly one hookpoint"),
        ("delta_crosscoder", {"objective__delta__reference": 2}, "objective.delta.reference = 2: must be below the 2"),
        ("topk_crosscoder", {"constraints": {"hold_partition": {}}}, "the model has no partition"),
        (
            "dedicated_feature_crosscoder",
            {"crosscoder__partition": [{"models": [2], "share": 0.1}]},
            r"crosscoder.partition.0.models = \[2\]: must be some, and not all, of the 2 model\(s\)",
        ),
        (
            "dedicated_feature_crosscoder",
            {"crosscoder__partition": [{"models": [0], "share": 0.6}, {"models": [1], "share": 0.5}]},
            "crosscoder.partition: its blocks hold 1126 latents, n_latents is 1024",
        ),
        (
            "dedicated_feature_crosscoder",
            {"crosscoder__partition": [{"models": [0], "share": 0.0001}]},
            "crosscoder.partition.0.share = 0.0001: not one latent of n_latents = 1024",
        ),
        (
            "dedicated_feature_crosscoder",
            {"crosscoder__partition": [{"models": [0]}]},
            r"crosscoder.partition.0.share = None and crosscoder.partition.0.n_latents = None: give exactly one",
        ),
        (
            "feb_update_diffing_topk",
            {"crosscoder__partition": [{"models": [0], "n_latents": 1000}]},
            "crosscoder.partition: its blocks hold 1000 latents beside 41 tied ones, n_latents is 1024",
        ),
        (
            "topk_crosscoder",
            {"objective": {"recon": {}, "l1": {"shared_ratio": 0.1}}},
            "the model has no shared latents",
        ),
    ],
)
def test_contradictions_are_refused(recipe, changes, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    shown = refused(changed(recipe, **changes), tmp_path, capfd)
    assert re.search(message, shown), shown


def refused(values, folder, capfd):
    """What `crosscode train` says about a bad config: one line, and no other trace."""
    (folder / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    capfd.readouterr()
    assert main(["train", str(folder / "config.yaml")]) == 2
    shown = capfd.readouterr()
    assert shown.out == "" and shown.err.startswith("crosscode: ")
    assert len(shown.err.strip().splitlines()) == 1, shown.err
    assert not (folder / "runs").exists() and not (folder / "run").exists()
    return shown.err


@pytest.mark.parametrize(
    ("architecture", "hookpoints", "expected"),
    [
        ("cross_layer_transcoder", ["blocks.0.mlp.hook_in", "blocks.0.mlp.hook_pre"], ["mlp.hook_pre", "16"]),
        ("sae", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"], ["exactly one hookpoint", "2"]),
        ("transcoder", ["blocks.0.mlp.hook_in"], ["exactly two hookpoints", "1"]),
    ],
)
def test_hookpoints_that_do_not_fit_are_refused(architecture, hookpoints, expected, tiny_config, tmp_path, capfd):
    tiny_config["crosscoder"] |= {"type": architecture, "init": {"type": "zero_dec_skip"}}
    tiny_config |= {"hookpoints": hookpoints}
    if architecture != "model_hookpoint_acausal":
        tiny_config["language_models"] = tiny_config["language_models"][:1]
    shown = refused(tiny_config, tmp_path, capfd)
    assert all(text in shown for text in expected), shown


def test_shared_decoders_that_start_apart_are_refused_at_the_start_of_training(make_case):
    """Without `identical_latents` the tied vectors would differ; see test_constraints for the message."""
    from crosscode.models import AnthropicTransposeInit
    from crosscode.trainers.constraints import constraints_for

    model = make_case("acausal_shared").model.init_weights(AnthropicTransposeInit())
    (tie,) = constraints_for(model)
    with pytest.raises(InputError, match="identical_latents"):
        tie.start(model)


def test_a_large_ratio_of_penalties_is_only_warned_of(caplog):
    values = changed("feb_update_diffing_jumprelu")
    values["objective"]["tanh"]["shared_ratio"] = 0.5
    with caplog.at_level(logging.WARNING, logger="crosscode"), pytest.raises(InputError, match="/nowhere/"):
        open_experiment(check_config(values))
    assert "objective.tanh.shared_ratio = 0.5: lambda_s / lambda_f above 0.3" in caplog.text
