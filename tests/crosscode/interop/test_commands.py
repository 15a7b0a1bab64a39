"""`crosscode export`, `import` and `convert`, on runs."""

from __future__ import annotations

import json
import re

import pytest
import torch
import yaml

import crosscode
from crosscode.commands.cli import main
from crosscode.errors import InputError
from crosscode.models import BaseCrosscoder


@pytest.fixture
def written(tiny_config, tmp_path):
    """A config file, with the section `crosscoder` and hookpoints replaced."""

    def write(name="config", **values):
        file = tmp_path / f"{name}.yaml"
        config = {**tiny_config, "name": name, "run_dir": str(tmp_path / name), **values}
        file.write_text(yaml.safe_dump(config))
        return str(file)

    return write


@pytest.fixture
def sae_config(written, tiny_config):
    section = {
        "type": "sae",
        "n_latents": 32,
        "activation": {"type": "topk", "k": 4},
        "init": {"type": "anthropic_transpose"},
    }
    return written("sae", crosscoder=section, language_models=tiny_config["language_models"][:1])


@pytest.fixture
def sae_run(sae_config, tmp_path):
    assert main(["train", sae_config]) == 0
    return tmp_path / "sae"


def test_a_run_goes_out_is_converted_and_comes_back_as_a_run(sae_run, sae_config, tmp_path, capsys):
    saved = json.loads((sae_run / "final" / "config.json").read_text())["metadata"]
    assert saved["widths"] == [[16]] and saved["language_models"][0]["class"] == "LlamaForCausalLM"
    assert saved["language_models"][0]["n_layers"] == 3
    capsys.readouterr()

    assert main(["convert", str(sae_run), "--activation", "jumprelu", "--out", str(tmp_path / "jump")]) == 0
    shown = capsys.readouterr().out
    before, after = re.search(r"L0 +(\S+) -> (\S+)", shown).groups()
    assert abs(float(after) - 4) < 1 and float(before) == pytest.approx(4, abs=0.1) and "FVU" in shown
    jump = crosscode.open(tmp_path / "jump")
    assert jump.model.activation_fn.type_name() == "jumprelu" and jump.summary["l0"] == pytest.approx(
        float(after), abs=0.01
    )

    assert main(["export", str(tmp_path / "jump"), "--to", "saelens", "--out", str(tmp_path / "out")]) == 0
    cfg = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert cfg["architecture"] == "jumprelu" and cfg["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    assert cfg["metadata"]["context_size"] == 16 and cfg["metadata"]["prepend_bos"] is True

    (tmp_path / "out" / "crosscode.json").unlink()  # as somebody else would have written it
    capsys.readouterr()
    arguments = ["import", str(tmp_path / "out"), "--from", "saelens", "--config", sae_config]
    assert main([*arguments, "--out", str(tmp_path / "back")]) == 0
    back = crosscode.open(tmp_path / "back")
    x_BD = torch.randn(20, 16)
    torch.testing.assert_close(back.model(x_BD), jump.model(x_BD))
    assert back.summary["fvu"] == pytest.approx(jump.summary["fvu"], rel=1e-4)
    assert back.evaluate(50).n_tokens == 50 and back.report().is_file()

    tuned = ["train", sae_config, "--run_dir", str(tmp_path / "tuned"), "--finetune_from", str(tmp_path / "out")]
    assert main([*tuned, "--crosscoder.activation", "{type: jumprelu}", "--name", "tuned"]) == 0
    assert main([*arguments, "--out", str(tmp_path / "back")]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_topk_becomes_a_batch_topk_with_a_threshold(sae_run, tmp_path, capsys):
    assert main(["convert", str(sae_run), "--activation", "batch_topk"]) == 0
    run = crosscode.open(tmp_path / "sae-batch_topk")
    assert run.config.crosscoder.activation.k == 4 and run.summary["l0"] == pytest.approx(4, abs=1)
    assert main(["convert", str(sae_run), "--activation", "relu"]) == 2
    assert "can become 'jumprelu', and a topk 'batch_topk'" in capsys.readouterr().err


def test_a_model_is_checked_against_the_language_models_that_it_meets(sae_run, tiny_lms):
    file = sae_run / "config.yaml"
    text = file.read_text()
    file.write_text(text.replace("blocks.1.hook_resid_post", "blocks.0.hook_resid_post"))
    with pytest.raises(InputError, match=r"hookpoints = .*was trained with \['blocks\.1\.hook_resid_post'\]"):
        crosscode.open(sae_run).evaluate(20)
    file.write_text(text.replace(tiny_lms[0], tiny_lms[1]))
    with pytest.raises(InputError, match="has other weights"):
        crosscode.open(sae_run).evaluate(20)
    changed = json.loads((sae_run / "final" / "config.json").read_text())
    changed["metadata"]["language_models"][0]["n_layers"] = 26
    (sae_run / "final" / "config.json").write_text(json.dumps(changed))
    (sae_run / "final" / "checksums.json").unlink()
    file.write_text(text)
    with pytest.raises(InputError, match="has n_layers 3 in place of 26"):
        crosscode.open(sae_run).evaluate(20)


def compound(layers, **options):
    hookpoints = [f"blocks.{i}.{hook}" for hook in ("mlp.hook_in", "hook_mlp_out") for i in layers]
    activation = options.pop("activation", {"type": "jumprelu"})
    section = {"type": "compound_cross_layer_transcoder", "n_latents": 48, "init": {"type": "compound_uniform"}}
    return {"hookpoints": hookpoints, "crosscoder": {**section, "activation": activation, **options}}


@pytest.mark.parametrize(
    ("values", "answer"),
    [
        (compound([0, 1, 2]), "can be exported to circuit-tracer"),
        (compound([1, 2]), "every layer from 0 to 2, and these are 1, 2; name the hookpoints of every layer"),
        (compound([0, 1, 2], activation={"type": "topk", "k": 3}), "from a local folder no topk"),
        (compound([0, 1, 2], linear_skip=True), "train without crosscoder.linear_skip"),
    ],
)
def test_a_config_is_answered_before_training(values, answer, written, tiny_config, capsys):
    config = written(**values, language_models=tiny_config["language_models"][:1])
    code = main(["export", "--check", config, "--to", "circuit-tracer"])
    said = capsys.readouterr()
    assert answer in said.out + said.err and code == (0 if answer.startswith("can") else 2)


def test_the_transcoder_of_one_layer_is_told_which_are_missing(written, tiny_config, capsys):
    section = {**compound([1])["crosscoder"], "type": "transcoder", "init": {"type": "anthropic_transpose"}}
    hookpoints = ["blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"]
    config = written(hookpoints=hookpoints, crosscoder=section, language_models=tiny_config["language_models"][:1])
    assert main(["export", "--check", config, "--to", "circuit-tracer"]) == 0
    assert "still to train are 0, 2" in capsys.readouterr().out


def test_a_config_whose_language_model_is_not_here_is_answered(written, capsys):
    section = {"type": "sae", "expansion_factor": 4, "activation": {"type": "batch_topk", "k": 32}}
    section["init"] = {"type": "anthropic_transpose"}
    models = [{"path": "package:no_such_package/model.gguf", "name": "elsewhere"}]
    config = written(hookpoints=["blocks.1.hook_resid_post"], crosscoder=section, language_models=models)
    assert main(["export", "--check", config, "--to", "saelens"]) == 0, capsys.readouterr().err


def test_our_recipe_of_later_layers_alone_is_refused(capsys):
    assert main(["export", "--check", "compound_clt", "--to", "circuit-tracer"]) == 2
    assert "it wants every layer from 0" in capsys.readouterr().err


def test_all_transcoders_of_a_folder_are_imported(awkward, tmp_path):
    from crosscode.interop.export import export

    pairs = [[f"blocks.{i}.mlp.hook_in", f"blocks.{i}.hook_mlp_out"] for i in range(2)]
    cases = [awkward("transcoder", "relu", hookpoints=pair, n_layers=2, seed=i) for i, pair in enumerate(pairs)]
    export([case.model for case in cases], "circuit-tracer", tmp_path / "set")
    assert main(["import", str(tmp_path / "set"), "--out", str(tmp_path / "models")]) == 0
    back = BaseCrosscoder.load(tmp_path / "models", backend="torch")
    y_BPD = torch.stack([case.model(case.raw_BXiDi) for case in cases], 1)
    torch.testing.assert_close(back(torch.stack([case.raw_BXiDi for case in cases], 1)), y_BPD)
    assert back.metadata["hookpoints"] == [pair[i] for i in range(2) for pair in pairs]


def test_what_is_of_no_format_is_said(tmp_path, capsys):
    (tmp_path / "some").mkdir()
    assert main(["import", str(tmp_path / "some"), "--out", str(tmp_path / "out")]) == 2
    assert "is of no format that is known (circuit-tracer, " in capsys.readouterr().err
    assert main(["import", str(tmp_path / "none"), "--out", str(tmp_path / "out"), "--from", "saelens"]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "some"), "--to", "saelens", "--out", str(tmp_path / "out")]) == 2
    assert "holds neither a saved model nor a run with one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_nested_topk_is_converted(written, tiny_config, tmp_path):
    section = {
        "type": "sae",
        "n_latents": 32,
        "prefixes": [8, 16],
        "activation": {"type": "topk", "k": 4},
        "init": {"type": "anthropic_transpose"},
    }
    config = written("nested", crosscoder=section, language_models=tiny_config["language_models"][:1])
    assert main(["train", config]) == 0
    assert main(["convert", str(tmp_path / "nested"), "--activation", "jumprelu", "--out", str(tmp_path / "jump")]) == 0
    assert crosscode.open(tmp_path / "jump").model.prefix(8).n_latents == 8


def test_what_an_export_of_ours_is_of_must_be_true_of_the_config(sae_run, written, tiny_config, tmp_path, capsys):
    assert main(["convert", str(sae_run), "--activation", "jumprelu", "--out", str(tmp_path / "jump")]) == 0
    assert main(["export", str(tmp_path / "jump"), "--to", "saelens", "--out", str(tmp_path / "out")]) == 0
    lms = tiny_config["language_models"]
    for other in (
        {"hookpoints": ["blocks.0.hook_resid_post"], "language_models": lms[:1]},
        {"language_models": lms[1:2]},
    ):
        config = written(
            "other", crosscoder=yaml.safe_load((sae_run / "config.yaml").read_text())["crosscoder"], **other
        )
        assert main(["import", str(tmp_path / "out"), "--out", str(tmp_path / "back"), "--config", config]) == 2
        assert not (tmp_path / "back").exists()
    said = capsys.readouterr().err
    assert "the model's files say ['blocks.1.hook_resid_post']" in said and "has other weights" in said
