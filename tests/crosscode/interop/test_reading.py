"""Files that others wrote.

Axes: B tokens · D width · L latents · P layers.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from crosscode.errors import InputError
from crosscode.models import BaseCrosscoder, CompoundCrossLayerTranscoder, SAEOrTranscoder

D, L = 4, 9


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)

    def make(**shapes):
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    return make


@pytest.fixture
def x_BD():
    return torch.randn(30, D, generator=torch.Generator().manual_seed(1))


def same(model, x, a_BL, y):
    torch.testing.assert_close(model.encode(x), a_BL)
    torch.testing.assert_close(model(x), y)


def test_gemma_scope_1(tensors, x_BD, tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    t = tensors(W_enc=(D, L), W_dec=(L, D), b_enc=(L,), b_dec=(D,), threshold=(L,))  # some thresholds are negative
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in t.items()})
    h_BL = x_BD @ t["W_enc"] + t["b_enc"]
    a_BL = (h_BL > t["threshold"]) * h_BL.relu()
    for path in (folder, folder / "params.npz"):
        model = SAEOrTranscoder.load(path, backend="reference")
        same(model, x_BD, a_BL, a_BL @ t["W_dec"] + t["b_dec"])
        assert str(model.backend) == "reference"
    assert model.metadata["hookpoints"] == ["blocks.20.hook_resid_post"] and model.metadata["architecture"] == "sae"
    with pytest.raises(InputError, match="holds a 'sae_or_transcoder' model, not a CompoundCrossLayerTranscoder"):
        CompoundCrossLayerTranscoder.load(folder)


def test_a_transcoder_with_an_affine_skip_of_gemma_scope_2(tensors, x_BD, tmp_path):
    folder = tmp_path / "transcoder_all" / "layer_3_width_16k_l0_small_affine"
    folder.mkdir(parents=True)
    t = tensors(w_enc=(D, L), w_dec=(L, D), b_enc=(L,), b_dec=(D,), threshold=(L,), affine_skip_connection=(D, D))
    save_file(t, folder / "params.safetensors")
    h_BL = x_BD @ t["w_enc"] + t["b_enc"]
    a_BL = (h_BL > t["threshold"]) * h_BL.relu()
    y_BD = a_BL @ t["w_dec"] + t["b_dec"] + x_BD @ t["affine_skip_connection"]
    model = BaseCrosscoder.load(folder, backend="torch")
    same(model, x_BD, a_BL, y_BD)
    assert model.metadata["hookpoints"] == ["blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out"]


def test_a_cross_layer_transcoder_of_gemma_scope_2(tensors, x_BD, tmp_path):
    P, x_BPD = 3, torch.stack([x_BD, 2 * x_BD, -x_BD], 1)
    y_BPD, latents = torch.zeros(30, P, D), []
    for i in range(P):
        t = tensors(
            w_enc=(D, L), w_dec=(L, P, D), b_enc=(L,), b_dec=(D,), threshold=(L,), affine_skip_connection=(D, D)
        )
        t["w_dec"][:, :i] = 0
        save_file(t, tmp_path / f"params_layer_{i}.safetensors")
        h_BL = x_BPD[:, i] @ t["w_enc"] + t["b_enc"]
        latents.append((h_BL > t["threshold"]) * h_BL.relu())
        y_BPD += torch.einsum("bl,lpd->bpd", latents[-1], t["w_dec"])
        y_BPD[:, i] += t["b_dec"] + x_BPD[:, i] @ t["affine_skip_connection"]
    same(BaseCrosscoder.load(tmp_path, backend="torch"), x_BPD, torch.cat(latents, 1), y_BPD)
    (tmp_path / "params_layer_1.safetensors").unlink()
    with pytest.raises(InputError, match="layers 0, 2 are there; a cross-layer transcoder has all from 0 on"):
        BaseCrosscoder.load(tmp_path)


def dictionary(folder, dict_class, state, **trainer):
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": dict_class, **trainer}}))
    torch.save(state, folder / "ae.pt")
    return folder


def test_the_older_autoencoder_of_dictionary_learning_subtracts_its_bias(tensors, x_BD, tmp_path):
    t = tensors(**{"encoder.weight": (L, D), "encoder.bias": (L,), "decoder.weight": (D, L), "bias": (D,)})
    model = BaseCrosscoder.load(dictionary(tmp_path, "AutoEncoder", t), backend="torch")
    a_BL = ((x_BD - t["bias"]) @ t["encoder.weight"].T + t["encoder.bias"]).relu()
    same(model, x_BD, a_BL, a_BL @ t["decoder.weight"].T + t["bias"])


def test_a_matryoshka_of_dictionary_learning(tensors, x_BD, tmp_path):
    t = tensors(W_enc=(D, L), W_dec=(L, D), b_enc=(L,), b_dec=(D,))
    state = t | {"k": torch.tensor(3), "threshold": torch.tensor(0.4), "group_sizes": torch.tensor([4, 5])}
    model = BaseCrosscoder.load(dictionary(tmp_path, "MatryoshkaBatchTopKSAE", state, k=3), backend="torch")
    a_BL = ((x_BD - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    a_BL = a_BL * (a_BL > 0.4)
    same(model, x_BD, a_BL, a_BL @ t["W_dec"] + t["b_dec"])


def test_a_crosscoder_with_means_of_its_own(tensors, tmp_path):
    shapes = {"encoder.weight": (2, D, L), "encoder.bias": (L,), "decoder.weight": (2, L, D), "decoder.bias": (2, D)}
    t = tensors(**shapes, activation_mean=(2, D), activation_std=(2, D))
    scale_X = torch.tensor([0.5, 3.0])
    state = t | {
        "activation_global_scale": scale_X,
        "target_rms": torch.tensor(1.0),
        "code_normalization_id": torch.tensor(1),
        "k": torch.tensor(3),
        "threshold": torch.tensor(2.0),
    }
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"dict_class": "BatchTopKCrossCoder", "activation_dim": D}))
    x_BXD = torch.randn(30, 2, D, generator=torch.Generator().manual_seed(2))
    scaled_BXD = (x_BXD - t["activation_mean"]) * scale_X[:, None]
    a_BL = (torch.einsum("bxd,xdl->bl", scaled_BXD, t["encoder.weight"]) + t["encoder.bias"]).relu()
    a_BL = a_BL * (a_BL * t["decoder.weight"].norm(dim=2).sum(0) > 2.0)
    y_BXD = torch.einsum("bl,xld->bxd", a_BL, t["decoder.weight"]) + t["decoder.bias"]
    model = BaseCrosscoder.load(tmp_path, backend="torch")
    same(model, x_BXD[:, :, None], a_BL, (y_BXD / (scale_X[:, None] + 1e-8) + t["activation_mean"])[:, :, None])


def saelens(folder, t, **config):
    save_file(t, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": L, **config}))
    return folder


def test_a_topk_of_saelens_that_ranks_by_decoder_norm(tensors, x_BD, tmp_path):
    t = tensors(W_enc=(D, L), W_dec=(L, D), b_enc=(L,), b_dec=(D,))
    config = {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": True}
    model = BaseCrosscoder.load(saelens(tmp_path, t, **config), backend="torch")
    n_L = t["W_dec"].norm(dim=1)
    scaled_BL = ((x_BD - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * n_L
    values, indices = scaled_BL.topk(3, dim=1)
    a_BL = torch.zeros(30, L).scatter(1, indices, values.relu())
    same(model, x_BD, a_BL, a_BL / n_L @ t["W_dec"] + t["b_dec"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "gated"}, "architecture 'gated' is none of ours; read are standard"),
        ({"architecture": "standard", "normalize_activations": "layer_norm"}, "normalize_activations = 'layer_norm'"),
        ({"architecture": "topk"}, "names no k of its TopK"),
    ],
)
def test_what_ours_cannot_be_is_refused_by_name(config, message, tensors, tmp_path):
    t = tensors(W_enc=(D, L), W_dec=(L, D), b_enc=(L,), b_dec=(D,))
    with pytest.raises(InputError, match=message):
        BaseCrosscoder.load(saelens(tmp_path, t, **config))


def test_shapes_that_do_not_fit_are_said(tensors, tmp_path):
    t = tensors(W_enc=(D, L), W_dec=(L, D), b_enc=(1,), b_dec=(D,))
    with pytest.raises(InputError, match=r"b_enc has shape \(1,\), expected \(9,\)"):
        BaseCrosscoder.load(saelens(tmp_path, t, architecture="standard"))


class Evil:
    def __reduce__(self):
        return (print, ("code of theirs ran",))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("W_dec", torch.nan, "W_dec holds NaN or infinity"),
        ("b_enc", torch.inf, "b_enc holds NaN or infinity"),
        ("threshold", torch.nan, "threshold holds NaN"),
        ("W_enc", 1j, "something else than real tensors"),
    ],
)
def test_numbers_that_no_weight_has_are_refused_with_the_path(name, value, message, tensors, tmp_path):
    t = tensors(W_enc=(D, L), W_dec=(L, D), b_enc=(L,), b_dec=(D,), threshold=(L,))
    t[name] = t[name] * value
    np.savez(tmp_path / "params.npz", **{key: tensor.numpy() for key, tensor in t.items()})
    with pytest.raises(InputError, match=message) as error:
        BaseCrosscoder.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_folder_in_place_of_a_file_is_said(tmp_path):
    (tmp_path / "layer_0.safetensors").mkdir()
    with pytest.raises(InputError, match=r"layer_0\.safetensors: missing"):
        BaseCrosscoder.load(tmp_path)


def test_no_code_of_a_file_runs(tmp_path, capsys):
    dictionary(tmp_path, "AutoEncoder", {"encoder.weight": Evil()})
    with pytest.raises(InputError, match="damaged, or holds more than tensors"):
        BaseCrosscoder.load(tmp_path)
    folder = tmp_path / "scope"
    folder.mkdir()
    np.savez(folder / "params.npz", W_enc=np.array([Evil()], dtype=object), b_enc=1, b_dec=1, threshold=1)
    with pytest.raises(InputError, match="damaged, or holds more than tensors"):
        BaseCrosscoder.load(folder)
    assert "ran" not in capsys.readouterr().out


def test_a_folder_of_no_format_is_said_as_before(tmp_path):
    with pytest.raises(InputError, match=r"no config.json there; expected a folder written by `save`"):
        BaseCrosscoder.load(tmp_path / "nothing")
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match=r"no config.json there"):
        BaseCrosscoder.load(tmp_path)
