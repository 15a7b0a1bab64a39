"""`crosscode verify`, and what `evaluate` refuses to judge."""

import json
import logging
import re

import numpy as np
import pytest
import yaml

import crosscode
from crosscode.commands.cli import main
from crosscode.data.store.manifest import read_manifest

SECTION = {"type": "sae", "n_latents": 16, "activation": {"type": "topk", "k": 2}}


@pytest.fixture
def run(tmp_path):
    acts = np.random.default_rng(0).standard_normal((400, 8)).astype("float32")
    np.save(tmp_path / "acts.npy", acts)
    options = {"n_tokens": 512, "batch_size": 64, "device": "cpu", "progress": False}
    return crosscode.train(tmp_path / "acts.npy", SECTION, run_dir=tmp_path / "run", **options, checkpoint_every=3).path


def verified(path, capsys):
    code = main(["verify", str(path)])
    printed = capsys.readouterr()
    found = dict(line.split(maxsplit=1)[::-1] for line in printed.out.splitlines())
    return code, {name: state for name, state in found.items() if state != "whole"}, printed.err


def test_a_whole_run_and_a_saved_model_are_whole(run, capsys):
    assert verified(run, capsys)[:2] == (0, {})
    assert verified(run / "final", capsys)[:2] == (0, {})


def cut(path, n=10):
    path.write_bytes(path.read_bytes()[:-n])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def without_entry(path):
    sums = json.loads(path.read_text())
    del sums["files"]["model.safetensors"]
    path.write_text(json.dumps(sums))


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("final/model.safetensors", flip, "final: .*another checksum"),
        ("final/checksums.json", without_entry, "final: .*lacks model.safetensors"),
        ("checkpoints/step_8/trainer_state.json", cut, "checkpoints/step_8: .*bytes instead of"),
        ("checkpoints/step_8/checksums.json", lambda path: path.unlink(), "checkpoints/step_8: .*is missing"),
        ("summary.json", lambda path: path.write_text('{"step": "many"}'), "summary.json: "),
        ("metrics.jsonl", lambda path: path.write_text(path.read_text() + '{"step": '), "metrics.jsonl: 1 line"),
        ("config.yaml", lambda path: path.write_text("a: [1"), "config.yaml: "),
    ],
)
def test_damage_is_named(file, damage, said, run, capsys):
    damage(run / file)
    code, bad, err = verified(run, capsys)
    assert code == 1 and len(bad) == 1
    assert re.match(said, next(iter(bad))), bad
    assert err.count("\n") == 1 and "are not as they were written" in err


def test_what_is_nothing_of_ours_is_refused(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2 and main(["verify", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("crosscode: verify:") == 2


def write(folder, config):
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "config.yaml")


def test_a_store_is_read_whole(tiny_config, tmp_path, capsys):
    config = write(tmp_path, tiny_config)
    assert main(["harvest", config, "--store", str(tmp_path / "store"), "--n-tokens", "1500"]) == 0
    capsys.readouterr()
    store = tmp_path / "store"
    assert read_manifest(store) is not None and verified(store, capsys)[:2] == (0, {})
    shard = max(store.glob("shard-*.safetensors"))
    whole = shard.read_bytes()
    flip(shard)  # the labels come last
    code, bad, _ = verified(store, capsys)
    assert code == 1 and "the labels of shard" in next(iter(bad)) and "do not match their checksum" in next(iter(bad))
    shard.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
    code, bad, _ = verified(store, capsys)
    assert code == 1 and "does not match its checksum" in next(iter(bad))
    shard.unlink()
    code, bad, _ = verified(store, capsys)
    assert code == 1 and "1 shards were written, 0 are there" in next(iter(bad))


@pytest.mark.parametrize("field", ["hookpoints", "language_models"])
def test_a_config_of_something_else_is_refused(field, tiny_config, tmp_path, capsys):
    assert main(["train", write(tmp_path, tiny_config), "--run-dir", str(tmp_path / "run")]) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    if field == "hookpoints":
        config["hookpoints"] = ["blocks.0.hook_resid_mid", *config["hookpoints"][1:]]
    else:
        config["language_models"].append({"path": "demo:tuned"})
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert f"{field} = " in capsys.readouterr().err


def test_other_rules_for_tokens_are_said(tiny_config, tmp_path, capsys, caplog):
    assert main(["train", write(tmp_path, tiny_config), "--run-dir", str(tmp_path / "run")]) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["data"]["sequence_length"] += 1
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    with caplog.at_level(logging.WARNING):
        assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert "data.sequence_length is" in caplog.text
