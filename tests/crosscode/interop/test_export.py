"""Exports: of several runs, of one position, and into which folders.

Axes: B tokens · X positions · D width.
"""

from __future__ import annotations

import logging

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import crosscode
from crosscode.errors import InputError
from crosscode.interop.export import export
from crosscode.interop.format import FORMATS
from crosscode.models import BaseCrosscoder


def transcoders(awkward, layers, n_layers=3, **options):
    hooks = [[f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out"] for layer in layers]
    kinds = ["transcoder", "skip_transcoder", "transcoder"]
    return [
        awkward(kinds[i], "jumprelu", hookpoints=pair, seed=i, n_layers=n_layers, **options)
        for i, pair in enumerate(hooks)
    ]


def test_transcoders_of_several_runs_become_one_set(awkward, tmp_path):
    cases = transcoders(awkward, [2, 0, 1])
    folder = export([case.model for case in cases], "circuit-tracer", tmp_path / "set")
    for case, layer in zip(cases, [2, 0, 1], strict=True):
        back = BaseCrosscoder.load(folder / f"layer_{layer}.safetensors", backend="torch")
        torch.testing.assert_close(back(case.raw_BXiDi), case.model(case.raw_BXiDi))
        assert back.metadata["hookpoints"] == case.model.metadata["hookpoints"]
        assert "W_skip" in load_file(folder / f"layer_{layer}.safetensors"), "it asks one layer whether all have a skip"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["feature_input_hook"] == "mlp.hook_in" and config["model_name"] == "somebody/base"
    whole = BaseCrosscoder.load(folder, backend="torch")
    in_order = [cases[i] for i in (1, 2, 0)]
    raw_BPD = torch.stack([case.raw_BXiDi for case in in_order], 1)
    torch.testing.assert_close(whole(raw_BPD), torch.stack([c.model(c.raw_BXiDi) for c in in_order], 1))
    assert whole.metadata["hookpoints"] == [c.model.metadata["hookpoints"][i] for i in (0, 1) for c in in_order]


def test_a_layer_of_a_set_is_a_transcoder(awkward, tmp_path):
    case = awkward("set_skip", "batch_topk")
    case.model.metadata = {**case.model.metadata, "output_positions": [f"base/out{i}" for i in range(3)]}
    folder = case.model.export("saelens", tmp_path / "out", position="base/out1")
    back = BaseCrosscoder.load(folder, backend="torch")
    torch.testing.assert_close(back(case.raw_BXiDi[:, 1]), case.model(case.raw_BXiDi)[:, 1])
    assert back.metadata["hookpoints"] == case.model.metadata["hookpoints"][1::3]


@pytest.mark.parametrize(
    ("layers", "n_layers", "message"),
    [
        ([0, 2], 3, "every layer from 0 to 2, and these are 0, 2; give the runs of all layers"),
        ([1, 2], 0, "every layer from 0 to 2, and these are 1, 2"),
        ([0, 1], 3, "every layer from 0 to 2, and these are 0, 1"),
        ([0, 0], 0, "one transcoder for each layer, and these are of layers 0, 0"),
    ],
)
def test_layers_are_whole(layers, n_layers, message, awkward, tmp_path):
    models = [case.model for case in transcoders(awkward, layers, n_layers)]
    with pytest.raises(InputError, match=message):
        export(models, "circuit-tracer", tmp_path / "set")


def test_circuit_tracer_wants_names_of_its_table(awkward, tmp_path):
    case = awkward("transcoder", "relu", hookpoints=["blocks.0.hook_resid_pre", "blocks.0.hook_mlp_out"])
    with pytest.raises(InputError, match=r"'hook_resid_pre' has not; train on blocks.N.hook_mlp_out"):
        case.model.export("circuit-tracer", tmp_path / "out")
    case = awkward("transcoder", "relu")
    case.model.metadata["language_models"][0]["class"] = "Qwen3ForCausalLM"  # which knows mlp.hook_out alone
    folder = case.model.export("circuit-tracer", tmp_path / "out")
    assert yaml.safe_load((folder / "config.yaml").read_text())["feature_output_hook"] == "mlp.hook_out"
    case.model.metadata = {"architecture": "transcoder"}
    with pytest.raises(InputError, match=r"set model\.metadata"):
        case.model.export("circuit-tracer", tmp_path / "other")


def test_one_format_holds_one_coder(awkward, tmp_path):
    models = [awkward("sae", "relu").model] * 2
    with pytest.raises(InputError, match="holds one coder, and 2 are given"):
        export(models, "saelens", tmp_path / "out")
    with pytest.raises(InputError, match="read alone; written are circuit-tracer, "):
        models[0].export("gemma-scope", tmp_path / "out")
    with pytest.raises(InputError, match=r"unknown type 'sealens' .did you mean 'saelens'"):
        models[0].export("sealens", tmp_path / "out")


@pytest.mark.parametrize("index", [0, 2])
def test_one_output_of_a_cross_layer_transcoder_is_a_transcoder(index, awkward, tmp_path):
    case = awkward("clt", "batch_topk_by_norm")
    names = [f"base/{hook}" for hook in case.model.metadata["hookpoints"][1:]]
    case.model.metadata["output_positions"] = names
    back = BaseCrosscoder.load(case.model.export("saelens", tmp_path / "out", position=names[index]), backend="torch")
    torch.testing.assert_close(back(case.raw_BXiDi), case.model(case.raw_BXiDi)[:, index])
    assert torch.equal(back.encode(case.raw_BXiDi), case.model.encode(case.raw_BXiDi))
    assert back.metadata["hookpoints"] == ["blocks.0.mlp.hook_in", f"blocks.{index}.hook_mlp_out"]
    assert back.metadata["architecture"] == "transcoder"
    with pytest.raises(InputError, match=r"there are base/blocks.0.hook_mlp_out, "):
        case.model.export("saelens", tmp_path / "other", position="base/nothing")


@pytest.mark.parametrize("kind", ["crosscoder_2x1_pre_bias", "crosscoder_2x3"])
def test_one_position_of_a_crosscoder_is_an_sae_of_what_it_does_where_the_others_are_0(kind, awkward, tmp_path, caplog):
    case = awkward(kind, "batch_topk_by_norm")
    n_positions = len(case.model.segments)
    with caplog.at_level(logging.WARNING, "crosscode"):
        folder = case.model.export("saelens", tmp_path / "out", position="1")
    assert "read all its positions" in caplog.text
    back = BaseCrosscoder.load(folder, backend="torch")
    raw_BXD = case.raw_BXiDi.flatten(1, -2).clone()
    raw_BXD[:, [x for x in range(n_positions) if x != 1]] = 0
    expected_BXD = case.model(raw_BXD.reshape(case.raw_BXiDi.shape)).flatten(1, -2)
    torch.testing.assert_close(back(raw_BXD[:, 1]), expected_BXD[:, 1], rtol=1e-5, atol=1e-5)
    assert back.metadata["architecture"] == "sae"


def test_a_position_of_a_compound_model_is_no_transcoder(awkward, tmp_path):
    with pytest.raises(InputError, match="comes from several layers"):
        awkward("compound", "relu").model.export("saelens", tmp_path / "out", position="0")


# ---- folders


def test_nothing_is_written_into_a_folder_that_is_there(awkward, tmp_path):
    model, out = awkward("sae", "relu").model, tmp_path / "out"
    model.export("saelens", out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(InputError, match="is there already; name a new folder, or add --overwrite"):
        model.export("saelens", out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"'notes.txt' in it is no part of such an export"):
        model.export("saelens", out, overwrite=True)


def test_an_earlier_export_is_replaced_whole(awkward, tmp_path):
    out = tmp_path / "set"
    export([case.model for case in transcoders(awkward, [0, 1, 2])], "circuit-tracer", out)
    export([transcoders(awkward, [0], 1)[0].model], "circuit-tracer", out, overwrite=True)
    assert sorted(file.name for file in out.iterdir()) == ["config.yaml", "crosscode.json", "layer_0.safetensors"]


def test_a_failed_export_leaves_what_was_there(awkward, tmp_path, monkeypatch):
    model, out = awkward("sae", "relu").model, tmp_path / "out"
    made = FORMATS["saelens"]

    def fail(self, coders, folder):
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(made, "write", fail)
        with pytest.raises(OSError, match="disk full"):
            model.export("saelens", out)
    assert list(tmp_path.iterdir()) == []
    model.export("saelens", out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(made, "write", fail)
        with pytest.raises(OSError, match="disk full"):
            model.export("saelens", out, overwrite=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_link_and_the_working_folder_are_left_alone(awkward, tmp_path, monkeypatch):
    model = awkward("sae", "relu").model
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(InputError, match="is a link"):
        model.export("saelens", tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is the working folder"):
        model.export("saelens", tmp_path)


# ---- SAEBench


@pytest.mark.parametrize("kind", ["sae_pre_bias", "crosscoder_1x1"])
@pytest.mark.parametrize("active", ["topk", "groupmax", "jumprelu", "batch_topk_by_norm"])
def test_sae_bench_gets_unit_decoder_rows_and_our_outputs(kind, active, awkward):
    case = awkward(kind, active)
    coder = crosscode.SAEBenchCoder(case.model)
    torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(24))
    x_HSD = case.raw_BXiDi.reshape(4, 10, 5)
    torch.testing.assert_close(coder(x_HSD).reshape(case.raw_BXiDi.shape), case.model(case.raw_BXiDi))
    norms_L = case.model.W_dec_LXoDo.flatten(1).norm(dim=1)
    torch.testing.assert_close(coder.encode(x_HSD).flatten(0, 1), case.model.encode(case.raw_BXiDi) * norms_L)
    assert (coder.cfg.hook_name, coder.cfg.hook_layer, coder.cfg.d_sae) == ("blocks.0.hook_resid_post", 0, 24)
    if active == "jumprelu":  # whose encoder the benchmark may use by itself
        a_BL = case.model.encode(case.raw_BXiDi) * norms_L
        h_BL = case.raw_BXiDi.reshape(40, 5) @ coder.W_enc + coder.b_enc
        torch.testing.assert_close(a_BL[a_BL > 0], h_BL[a_BL > 0])


def test_sae_bench_is_for_saes(awkward):
    with pytest.raises(InputError, match="SAEBench measures SAEs"):
        crosscode.SAEBenchCoder(awkward("transcoder", "relu").model)
    case = awkward("sae", "relu")
    case.model.metadata = {}
    with pytest.raises(InputError, match="model_name: the model does not say it"):
        crosscode.SAEBenchCoder(case.model)


def test_what_is_read_and_written_is_one_layer_in_order(awkward, tmp_path):
    skewed = awkward("transcoder", "relu", hookpoints=["blocks.0.mlp.hook_in", "blocks.1.hook_mlp_out"], n_layers=2)
    hooks = [f"blocks.{i}.{hook}" for hook in ("mlp.hook_in", "hook_mlp_out") for i in (2, 1, 0)]
    for case in (skewed, awkward("compound", "relu", hookpoints=hooks)):
        with pytest.raises(InputError, match="reads and writes one layer, in order"):
            case.model.export("circuit-tracer", tmp_path / "out")


def test_files_of_others_are_not_overwritten(awkward, tmp_path):
    (tmp_path / "lm").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "lm" / name).write_text("a language model")
    with pytest.raises(InputError, match="no export of ours"):
        awkward("crosscoder_2x1", "relu").model.export("dictionary-learning", tmp_path / "lm", overwrite=True)
    assert (tmp_path / "lm" / "model.safetensors").read_text() == "a language model"


def test_layers_with_and_without_thresholds_come_back_as_one_set(awkward, tmp_path):
    pairs = [[f"blocks.{i}.mlp.hook_in", f"blocks.{i}.hook_mlp_out"] for i in range(2)]
    cases = [
        awkward("transcoder", kind, hookpoints=pair, n_layers=2)
        for kind, pair in zip(("relu", "batch_topk"), pairs, strict=True)
    ]
    back = BaseCrosscoder.load(export([case.model for case in cases], "circuit-tracer", tmp_path / "set"))
    y_BPD = torch.stack([case.model(case.raw_BXiDi) for case in cases], 1)
    torch.testing.assert_close(back(torch.stack([case.raw_BXiDi for case in cases], 1)), y_BPD)
    assert back.metadata["widths"] == [[5] * 4]


def test_a_position_that_is_not_there_is_refused_of_a_single_one_too(awkward, tmp_path):
    with pytest.raises(InputError, match="position = 'nonsense'"):
        awkward("sae", "relu").model.export("saelens", tmp_path / "out", position="nonsense")


def test_a_failed_export_leaves_no_folder(awkward, tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        awkward("sae", "relu").model.export("saelens", tmp_path / "new" / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_saelens_multiplies_latents_with_is_not_lost(awkward, tmp_path):
    folder = awkward("sae", "relu").model.export("saelens", tmp_path / "out")
    file = folder / "sae_weights.safetensors"
    save_file({**load_file(file), "scaling_factor": torch.full((24,), 3.0)}, file)
    with pytest.raises(InputError, match="has scaling_factor"):
        BaseCrosscoder.load(folder)
