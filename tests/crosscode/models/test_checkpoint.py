"""What loading says about a folder that does not fit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from crosscode.errors import InputError
from crosscode.models import BaseCrosscoder, ModelHookpointAcausalCrosscoder, SAEOrTranscoder


@pytest.fixture
def saved(make_case, tmp_path):
    path = tmp_path / "model"
    make_case("acausal_2x1", dtype=torch.float32).model.save(path, {"hookpoints": ["a"]})
    return path


def without_checksums(path):
    """As earlier versions left it."""
    (path / "checksums.json").unlink()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "has_checksums": False}))


def rewrite(path, change):
    without_checksums(path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_metadata_lies_beside_the_weights(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["metadata"] == {"hookpoints": ["a"]}
    assert config["model"]["kind"] == "model_hookpoint_acausal"
    assert sorted(file.name for file in saved.iterdir()) == ["checksums.json", "config.json", "model.safetensors"]


def test_saving_replaces_an_older_model_whole(saved, make_case):
    case = make_case("sae", "relu", dtype=torch.float32)
    case.model.save(saved)
    assert torch.equal(SAEOrTranscoder.load(saved).W_enc_LXiDi, case.model.W_enc_LXiDi)
    assert [file.name for file in saved.parent.iterdir()] == ["model"], "no temporary folder is left behind"


def test_a_missing_folder(tmp_path):
    with pytest.raises(InputError, match=r"no config.json there; expected a folder written by `save`"):
        BaseCrosscoder.load(tmp_path / "nothing")


def test_missing_weights(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model.safetensors is missing"):
        BaseCrosscoder.load(saved)
    without_checksums(saved)
    with pytest.raises(InputError, match=r"model.safetensors: missing"):
        BaseCrosscoder.load(saved)


def test_damaged_weights(saved):
    (saved / "model.safetensors").write_bytes(b"not a tensor in sight")
    with pytest.raises(InputError, match=r"damaged \(model.safetensors has 21 bytes instead of"):
        BaseCrosscoder.load(saved)
    without_checksums(saved)
    with pytest.raises(InputError, match=r"model.safetensors: damaged"):
        BaseCrosscoder.load(saved)


def test_a_changed_value_of_weights_or_config_is_damage(saved):
    for name, old, new in (("model.safetensors", b"\x00", b"\x01"), ("config.json", b'"k": 4', b'"k": 3')):
        before = (saved / name).read_bytes()
        (saved / name).write_bytes(new.join(before.rsplit(old, 1)))
        with pytest.raises(InputError, match=rf"damaged \({name} has another checksum than when it was written"):
            BaseCrosscoder.load(saved)
        (saved / name).write_bytes(before)
    BaseCrosscoder.load(saved)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_latents", "24", "model.n_latents = '24'"),
        ("n_latents", 10**15, "no such model can be made"),
        ("n_latents", -1, "model.n_latents = -1"),
        ("activation", "topk", "model.activation = 'topk'"),
        ("activation", {"type": "topk", "k": "many"}, "k = 'many'"),
        ("activation", {"type": "tpk"}, "did you mean 'topk'"),
        ("dtype", "save", "model.dtype = 'save'"),
        ("n_modelz", 2, "no such model can be made"),
    ],
)
def test_a_config_of_no_model_is_one_line(field, value, message, saved):
    without_checksums(saved)
    config = json.loads((saved / "config.json").read_text())
    config["model"][field] = value
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message) as caught:
        BaseCrosscoder.load(saved)
    assert "\n" not in str(caught.value)


def test_damaged_config(saved):
    (saved / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        BaseCrosscoder.load(saved)


def test_another_format(saved):
    (saved / "config.json").write_text('{"format_version": 99}')
    with pytest.raises(InputError, match="format_version = 99: this version reads a saved model of version 1"):
        BaseCrosscoder.load(saved)


def test_another_architecture(saved):
    with pytest.raises(InputError, match="holds a 'model_hookpoint_acausal' model, not a SAEOrTranscoder"):
        SAEOrTranscoder.load(saved)
    assert isinstance(BaseCrosscoder.load(saved), ModelHookpointAcausalCrosscoder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("b_enc_L"), "b_enc_L is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra is not part of this model"),
        (
            lambda t: t.update(b_enc_L=torch.zeros(3)),
            r"b_enc_L is torch.float32 \(3,\), expected torch.float32 \(24,\)",
        ),
        (
            lambda t: t.update(b_enc_L=torch.zeros(24, dtype=torch.float16)),
            r"b_enc_L is torch.float16 \(24,\), expected torch.float32 \(24,\)",
        ),
    ],
)
def test_tensors_that_differ_are_named(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(InputError, match=message):
        BaseCrosscoder.load(saved)


def test_all_differences_are_told_at_once(saved):
    rewrite(saved, lambda t: (t.pop("b_enc_L"), t.update(extra=torch.zeros(1))))
    with pytest.raises(InputError, match="b_enc_L is missing; extra is not part of this model"):
        BaseCrosscoder.load(saved)
