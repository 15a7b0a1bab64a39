"""Every way to a language model ends in the same frozen object, and every wrong way in one clear line."""

import json

import pytest
import safetensors.torch
import torch

from crosscode.data import (
    ActivationHarvester,
    check_hookpoints,
    load_language_model,
    load_skeleton,
    wrap_language_model,
)
from crosscode.errors import InputError

TOKENS_HS = torch.tensor([[1, 6, 7, 8, 9]])


@pytest.fixture
def folder(tmp_path, build_model, tokenizer):
    path = tmp_path / "model"
    build_model("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_folder_gives_the_model_that_was_saved(folder, build_model):
    loaded = load_language_model(str(folder))
    with torch.no_grad():
        expected = build_model("llama").eval()(TOKENS_HS).logits
        assert torch.equal(loaded.model(TOKENS_HS).logits, expected)
    assert (loaded.n_layers, loaded.d_model, loaded.vocab_size, loaded.max_sequence_length) == (3, 16, 46, 64)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_dtype(folder):
    assert load_language_model(str(folder), dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_dtype_is_the_checkpoints_own_and_activations_are_float32(stored, folder, build_model, caplog):
    build_model("llama").to(getattr(torch, stored)).save_pretrained(folder)
    with caplog.at_level("INFO", "crosscode"):
        loaded = load_language_model(str(folder))
    assert loaded.dtype == getattr(torch, stored)
    assert f"runs in {stored}" in caplog.text
    assert ActivationHarvester([loaded], ["blocks.1.hook_resid_post"]).harvest(TOKENS_HS).dtype == torch.float32
    assert load_language_model(str(folder), dtype="float32").dtype == torch.float32


def test_options_of_transformers_pass_through(folder):
    plain = load_language_model(str(folder))
    assert plain.config._attn_implementation == "sdpa"
    eager = load_language_model(str(folder), attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    assert eager.fingerprint() == plain.fingerprint()
    pytest.importorskip("accelerate")
    placed = load_language_model(str(folder), device_map={"": "cpu"})
    acts = [ActivationHarvester([m], ["blocks.1.hook_resid_post"]).harvest(TOKENS_HS) for m in (plain, placed)]
    assert torch.equal(*acts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_implementation": "nothing"}, "attn|nothing"),
        ({"quantization": {"load_in_2bit": True}}, r"quantization = \{'load_in_2bit': True\}: .*quant_method"),
        ({"quantization": {"quant_method": "none"}}, "quantization = .*none"),
        ({"device_map": "somewhere"}, "somewhere|device_map"),
    ],
)
def test_options_that_transformers_does_not_know_are_refused_in_one_line(options, message, folder):
    with pytest.raises(InputError, match=message) as error:
        load_language_model(str(folder), **options)
    assert "\n" not in str(error.value)


def test_fingerprint_sees_every_weight(folder, build_model, tokenizer):
    loaded = load_language_model(str(folder))
    print_of_file = loaded.fingerprint()
    assert wrap_language_model(build_model("llama"), tokenizer).fingerprint() == print_of_file
    weight = loaded.model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
    print_of_change = loaded.fingerprint()
    assert print_of_change != print_of_file
    with torch.no_grad():
        weight[3, [4, 5]] = weight[3, [5, 4]]
    assert loaded.fingerprint() not in (print_of_change, print_of_file)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("./missing", {}, "'./missing': no such folder"),
        ("/nowhere/at/all", {}, "no such folder"),
        ("/nowhere/model.gguf", {}, "no such folder"),
        ("FOLDER", {"dtype": "float8"}, "dtype: 'float8' is not one of auto, float32, bfloat16, float16"),
        ("FOLDER", {"gguf_file": "x.gguf"}, "gguf_file: 'x.gguf' is not in folder"),
        ("FOLDER/..", {}, "holds no config.json"),
        ("FOLDER", {"revision": "main"}, "revision = 'main': '.*' is on this machine, where it has none"),
        ("FOLDER", {"device": "gpu"}, "device = 'gpu': not available here"),
    ],
)
def test_wrong_names_are_refused(name, options, message, folder):
    with pytest.raises(InputError, match=message) as error:
        load_language_model(name.replace("FOLDER", str(folder)), **options)
    assert "\n" not in str(error.value)


def test_a_broken_folder_is_refused_in_one_line(folder):
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be loaded") as error:
        load_language_model(str(folder))
    assert "\n" not in str(error.value)


def _change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _drop_a_weight(folder):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_a_weight, r"1 of its 30 weights are not in the files \(model.layers.1.mlp.down_proj.weight"),
        (lambda folder: _change_config(folder, num_hidden_layers=5), "18 of its 48 weights are not in the files"),
        (lambda folder: _change_config(folder, hidden_size=32), "other shapes than its config.json describes"),
        (_cut, "deserializing header"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be loaded"),
        (
            lambda folder: (folder / "adapter_config.json").write_text("{}"),
            "'adapter_config.json' is there, an adapter",
        ),
        (lambda folder: (folder / "adapter_model.safetensors").touch(), "'adapter_model.safetensors' is there"),
        (
            lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
            "adapter_config.json is there, but no adapter_model.safetensors",
        ),
    ],
)
def test_weights_that_are_missing_or_wrong_are_never_random(damage, message, folder):
    damage(folder)
    with pytest.raises(InputError, match=message) as error:
        load_language_model(str(folder))
    assert "\n" not in str(error.value)


def test_a_model_without_a_tokenizer_runs_on_token_ids(folder):
    for path in folder.glob("token*"):
        path.unlink()
    model = load_language_model(str(folder))
    assert model.tokenizer is None
    assert ActivationHarvester([model], ["blocks.1.hook_resid_post"]).harvest(TOKENS_HS).shape == (1, 5, 1, 1, 16)


def test_hookpoints_are_checked_without_weights(folder):
    (folder / "model.safetensors").unlink()
    skeleton = load_skeleton(str(folder))
    assert skeleton.model.lm_head.weight.is_meta
    check_hookpoints(skeleton, ["blocks.1.hook_resid_post", "blocks.2.attn.hook_pattern"])
    for name in ("blocks.3.hook_resid_post", "blocks.1.hook_resid_pos"):
        with pytest.raises(
            InputError, match=f"'{name}' is not a hookpoint .*blocks.1.hook_resid_post|blocks.0 to blocks.2"
        ):
            check_hookpoints(skeleton, [name])


def test_a_run_in_bfloat16_is_close_to_float32(folder):
    tokens_HS = torch.randint(6, 46, (4, 20), generator=torch.Generator().manual_seed(0))
    exact, rounded = (
        ActivationHarvester([load_language_model(str(folder), dtype=dtype)], ["blocks.1.hook_resid_post"])
        for dtype in ("float32", "bfloat16")
    )
    cosine = torch.cosine_similarity(exact.harvest(tokens_HS), rounded.harvest(tokens_HS), dim=-1)
    assert 0.999 < float(cosine.min()) < 1
