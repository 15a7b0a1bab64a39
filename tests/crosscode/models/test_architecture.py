"""Architectures as configs name them, and what older configs called their options."""

from __future__ import annotations

import inspect

import pytest

from crosscode.build.experiment import build_model
from crosscode.build.resume import check_changes, config_values
from crosscode.build.schema import check_config, read_yaml
from crosscode.errors import InputError
from crosscode.formats import today
from crosscode.models import ARCHITECTURES, BaseCrosscoder, CompoundCrossLayerTranscoder


def crosscoder_of(recipe, **fields):
    values = read_yaml(recipe)
    values["crosscoder"] |= fields
    return check_config(today(values, recipe))


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_defaults_of_config_and_constructor_agree(name):
    config_fields, cls = ARCHITECTURES.config_class(name).model_fields, ARCHITECTURES[name]
    parameters = {**inspect.signature(BaseCrosscoder).parameters, **inspect.signature(cls).parameters}
    shared = {field for field in config_fields if field in parameters} - {"n_latents"}
    assert shared >= {"use_encoder_bias", "use_decoder_bias", "linear_skip", "decoder_norm"}
    assert {field: config_fields[field].default for field in shared} == {
        field: parameters[field].default for field in shared
    }


def test_own_fields_reach_the_model():
    activation = {"type": "topk", "k": 4}
    config = crosscoder_of("compound_clt", activation=activation, topk_scope="all_layers", own_layer=False)
    values = config_values(config)["crosscoder"]
    assert (values["topk_scope"], values["own_layer"]) == ("all_layers", False) and "options" not in values
    model = build_model(config, width=4)
    assert isinstance(model, CompoundCrossLayerTranscoder)
    assert model.topk_scope == "all_layers" and model.selects_over_parts and len(model.parts) == 2


def test_shared_latents_are_given_as_a_share_or_a_number():
    assert build_model(crosscoder_of("feb_update_diffing_topk"), width=4).n_shared_latents == round(0.04 * 1024)
    config = crosscoder_of("feb_update_diffing_topk", shared_fraction=None, n_shared_latents=7)
    assert build_model(config, width=4).n_shared_latents == 7


@pytest.mark.parametrize(
    ("recipe", "options"),
    [("sae_topk", {"use_pre_bias": True}), ("sae_topk", {}), ("compound_clt", {"own_layer": False})],
)
def test_configs_of_older_versions_are_read_and_resumed(recipe, options):
    now = crosscoder_of(recipe, **{"use_pre_bias": False, **options} if recipe == "sae_topk" else options)
    old = config_values(now)
    fields = ("use_pre_bias", "n_shared_latents", "own_layer", "topk_scope")
    old["crosscoder"] = {name: value for name, value in old["crosscoder"].items() if name not in fields}
    old["crosscoder"] |= {"options": options, "shared_fraction": None}
    then = check_config(today(old, "config.yaml"))
    assert then == now
    check_changes(config_values(then), config_values(now))


def test_without_a_type_it_is_a_crosscoder():
    values = read_yaml("topk_crosscoder")
    del values["crosscoder"]["type"]
    assert check_config(values) == check_config(read_yaml("topk_crosscoder"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "transcode"}, r"crosscoder.type = 'transcode': must be one of .*'transcoder'"),
        ({"topk_scope": "layer"}, r"crosscoder.topk_scope: unknown field \(value 'layer'\)"),
        ({"use_prebias": True}, r"crosscoder.use_prebias: unknown field \(value True\); did you mean 'use_pre_bias'\?"),
        ({"options": {"own_layer": True}}, r"crosscoder.own_layer: unknown field"),
        ({"shared_fraction": 0.5}, r"crosscoder.shared_fraction: unknown field"),
    ],
)
def test_fields_of_another_architecture_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        crosscoder_of("sae_topk", **fields)
