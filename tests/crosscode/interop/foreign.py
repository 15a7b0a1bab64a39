"""What other libraries compute from the files, each in its own words: float64, written from their sources.

Axes: B tokens · D width · L latents · X positions · P layers.
"""

from __future__ import annotations

import json

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor


def load(file) -> dict[str, Tensor]:
    found = torch.load(file, weights_only=True) if file.suffix == ".pt" else load_file(file)
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


def topk(a_BL, k):
    values, indices = a_BL.topk(k, dim=1)
    return torch.zeros_like(a_BL).scatter(1, indices, values)


def saelens(folder, x_BD):
    cfg, t = json.loads((folder / "cfg.json").read_text()), load(folder / "sae_weights.safetensors")
    architecture = cfg["architecture"]
    expected = {"W_enc", "b_enc", "W_dec", "b_dec"}
    expected |= {"threshold"} if "jumprelu" in architecture else set()
    expected |= {"W_skip"} if "skip" in architecture else set()
    assert t.keys() == expected, "loading there is strict"
    assert cfg["normalize_activations"] == cfg["reshape_activations"] == "none"
    assert t["W_enc"].shape == (cfg["d_in"], cfg["d_sae"])
    if "transcoder" in architecture:
        assert not cfg["apply_b_dec_to_input"] and t["W_dec"].shape == (cfg["d_sae"], cfg["d_out"])
    into = x_BD - t["b_dec"] if cfg["apply_b_dec_to_input"] else x_BD
    h_BL = into @ t["W_enc"] + t["b_enc"]
    a_BL = h_BL.relu()
    if architecture == "topk":
        assert cfg["rescale_acts_by_decoder_norm"] is False
        a_BL = topk(h_BL, cfg["k"]).relu()
    elif "jumprelu" in architecture:
        a_BL = a_BL * (h_BL > t["threshold"])
    y_BD = a_BL @ t["W_dec"] + t["b_dec"]
    return a_BL, y_BD + x_BD @ t["W_skip"].T if "skip" in architecture else y_BD


def sparsify(folder, x_BD):
    cfg, t = json.loads((folder / "cfg.json").read_text()), load(folder / "sae.safetensors")
    assert t.keys() == {"encoder.weight", "encoder.bias", "W_dec", "b_dec"} | (
        {"W_skip"} if cfg["skip_connection"] else set()
    )
    assert t["encoder.weight"].shape == t["W_dec"].shape == (cfg["num_latents"], cfg["d_in"])
    into = x_BD if cfg["transcode"] else x_BD - t["b_dec"]
    a_BL = (into @ t["encoder.weight"].T + t["encoder.bias"]).relu()
    if cfg["activation"] == "topk":
        a_BL = topk(a_BL, cfg["k"])
    else:
        values, indices = a_BL.unflatten(-1, (cfg["k"], -1)).max(dim=-1)
        offsets = torch.arange(0, a_BL.shape[1], a_BL.shape[1] // cfg["k"])
        a_BL = torch.zeros_like(a_BL).scatter(1, offsets + indices, values)
    y_BD = a_BL @ t["W_dec"] + t["b_dec"]
    return a_BL, y_BD + x_BD @ t["W_skip"].T if cfg["skip_connection"] else y_BD


def dictionary_learning(folder, x_BXD):
    config = json.loads((folder / "config.json").read_text())
    if "trainer" not in config:
        return _crosscoder(config, load(folder / "model.safetensors"), x_BXD.flatten(1, -2))
    trainer, t, x_BD = config["trainer"], load(folder / "ae.pt"), x_BXD
    match trainer["dict_class"]:
        case "AutoEncoderNew":
            a_BL = (x_BD @ t["encoder.weight"].T + t["encoder.bias"]).relu()
            return a_BL, a_BL @ t["decoder.weight"].T + t["decoder.bias"]
        case "JumpReluAutoEncoder":
            h_BL = x_BD @ t["W_enc"] + t["b_enc"]
            a_BL = (h_BL * (h_BL > t["threshold"])).relu()
            return a_BL, a_BL @ t["W_dec"] + t["b_dec"]
        case name:
            assert int(t["k"]) == trainer["k"] and t["k"].dtype == torch.int32 and t["threshold"].ndim == 0
            a_BL = ((x_BD - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]).relu()
            is_topk = name == "AutoEncoderTopK"
            a_BL = topk(a_BL, trainer["k"]) if is_topk else a_BL * (a_BL > t["threshold"])
            return a_BL, a_BL @ t["decoder.weight"].T + t["b_dec"]


def _crosscoder(config, t, x_BXD):
    s_X, is_on = (
        t["activation_global_scale"],
        not bool(t["activation_mean"].isnan().any() | t["activation_std"].isnan().any()),
    )
    if is_on:
        x_BXD = (x_BXD - t["activation_mean"]) * s_X[:, None]
    a_BL = (torch.einsum("bxd,xdl->bl", x_BXD, t["encoder.weight"]) + t["encoder.bias"]).relu()
    if config["dict_class"] == "BatchTopKCrossCoder":
        W_dec = t["decoder.weight"]
        norms = {1: W_dec.norm(dim=2).sum(0), 2: W_dec.norm(dim=(0, 2)), 4: torch.tensor(1.0)}
        names = {"CROSSCODER": 1, "SAE": 2, "NONE": 4}
        assert int(t["code_normalization_id"]) == names[config["code_normalization"]]
        a_BL = a_BL * (a_BL * norms[int(t["code_normalization_id"])] > t["threshold"])
    y_BXD = torch.einsum("bl,xld->bxd", a_BL, t["decoder.weight"]) + t["decoder.bias"]
    return a_BL, y_BXD / (s_X[:, None] + 1e-8) + t["activation_mean"] if is_on else y_BXD


def kissane(folder, x_BMPD):
    cfg, t = json.loads((folder / "cfg.json").read_text()), load(folder / "cc_weights.pt")
    assert t["W_enc"].shape == (2, cfg["d_in"], cfg["dict_size"]) and cfg["enc_dtype"] == "fp32"
    a_BL = (torch.einsum("bnd,ndh->bh", x_BMPD[:, :, 0], t["W_enc"]) + t["b_enc"]).relu()
    return a_BL, torch.einsum("bh,hnd->bnd", a_BL, t["W_dec"]) + t["b_dec"]


def circuit_tracer(folder, x_B):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    if config["model_kind"] == "transcoder_set":
        n_layers = len(list(folder.glob("layer_*.safetensors")))
        x_PBD = x_B[None] if x_B.ndim == 2 else x_B.transpose(0, 1)
        found = [_layer(load(folder / f"layer_{i}.safetensors"), x_PBD[i]) for i in range(n_layers)]
        return found[0] if n_layers == 1 else tuple(map(torch.stack, zip(*found, strict=True)))
    n_layers = len(list(folder.glob("W_enc_*.safetensors")))
    a, y_BPD = [], 0
    for i in range(n_layers):
        encoder, decoder = load(folder / f"W_enc_{i}.safetensors"), load(folder / f"W_dec_{i}.safetensors")
        h_BL = x_B[:, i] @ encoder[f"W_enc_{i}"].T + encoder[f"b_enc_{i}"]
        a.append(h_BL * (h_BL > encoder[f"threshold_{i}"]) if f"threshold_{i}" in encoder else h_BL.relu())
        out_BPD = torch.einsum("bl,lpd->bpd", a[-1], decoder[f"W_dec_{i}"])
        y_BPD = y_BPD + torch.nn.functional.pad(out_BPD, (0, 0, i, 0))
        y_BPD[:, i] += encoder[f"b_dec_{i}"]
    return torch.cat(a, 1), y_BPD


def _layer(t, x_BD):
    assert t.keys() <= {"W_enc", "W_dec", "b_enc", "b_dec", "W_skip", "activation_function.threshold"}
    h_BL = x_BD @ t["W_enc"].T + t["b_enc"]
    threshold = t.get("activation_function.threshold")
    a_BL = h_BL.relu() if threshold is None else h_BL * (h_BL > threshold)
    y_BD = a_BL @ t["W_dec"] + t["b_dec"]
    return a_BL, y_BD + x_BD @ t["W_skip"].T if "W_skip" in t else y_BD


APPLY = {
    "saelens": saelens,
    "sparsify": sparsify,
    "dictionary-learning": dictionary_learning,
    "kissane": kissane,
    "circuit-tracer": circuit_tracer,
}
