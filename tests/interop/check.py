"""Exports, loaded with the real libraries: `python tests/interop/check.py saelens` (sparsify, dictionary-learning,
circuit-tracer). A virtual environment of its own for each, in `$CROSSCODE_INTEROP` or /tmp/crosscode-interop.

Axes: B tokens · P layers · D width · L latents.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from crosscode.interop.export import export
from crosscode.models import (
    ACTIVATIONS,
    BaseCrosscoder,
    CompoundCrossLayerTranscoder,
    SAEOrTranscoder,
)

D, L = 6, 40
PACKAGES = {
    "saelens": "sae-lens",
    "sparsify": "eai-sparsify",
    "dictionary-learning": "dictionary-learning",
    "circuit-tracer": "circuit-tracer",
}
CONFIGS = {
    "relu": {"type": "relu"},
    "topk": {"type": "topk", "k": 4},
    "groupmax": {"type": "groupmax", "k": 4},
    "batch_topk": {"type": "batch_topk", "k": 4},
    "by_norm": {"type": "batch_topk", "k": 4, "rank_by": "decoder_norm_weighted"},
    "jumprelu": {"type": "jumprelu", "log_threshold_init": -1.5},
}
# What runs in the other environment, once for all: from each FOLDER and x, `latents` and `output`.
CHILD = """
import sys, torch
from safetensors.torch import load_file, save_file
def apply(folder, x):
{body}
    return {{"latents": latents.contiguous(), "output": output.contiguous()}}
with torch.no_grad():
    for folder, x, out in zip(*[iter(sys.argv[1:])] * 3):
        save_file(apply(folder, load_file(x)["x"]), out)
"""
BODIES = {
    "saelens": """
    from sae_lens import SAE
    sae = SAE.load_from_disk(folder)
    latents, output = sae.encode(x), sae(x)
""",
    "sparsify": """
    from sparsify import SparseCoder
    coder = SparseCoder.load_from_disk(folder)
    top = coder.encode(x)
    latents = torch.zeros(len(x), coder.num_latents).scatter(1, top.top_indices, top.top_acts)
    output = coder(x).sae_out
""",
    "dictionary-learning": """
    import types
    sys.modules.setdefault("nnsight", types.SimpleNamespace(LanguageModel=None))
    from dictionary_learning.utils import load_dictionary
    dictionary, _ = load_dictionary(folder, "cpu")
    latents, output = dictionary.encode(x), dictionary(x)
""",
    "circuit-tracer": """
    import glob, yaml
    from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
    config = yaml.safe_load(open(folder + "/config.yaml"))
    hooks = {key: config[key] for key in ("feature_input_hook", "feature_output_hook")}
    options = dict(scan="", device=torch.device("cpu"), dtype=torch.float32, lazy_encoder=False, lazy_decoder=False, **hooks)
    x_PBD = x.transpose(0, 1)
    if config["model_kind"] == "transcoder_set":
        files = {i: f"{folder}/layer_{i}.safetensors" for i in range(len(glob.glob(folder + "/layer_*")))}
        coder = load_transcoder_set(files, **options)
    else:
        coder = load_clt(folder, **options)
    features = coder.encode(x_PBD)
    latents = features.transpose(0, 1).flatten(1)
    output = coder.decode(features, x_PBD).transpose(0, 1)
""",
}


def models(library: str) -> Iterator[tuple[str, list[BaseCrosscoder], bool]]:
    """Name, models of one export, and whether the input has a layer axis."""
    if library == "circuit-tracer":
        for active in ("relu", "batch_topk", "by_norm", "jumprelu"):
            pairs = [[f"blocks.{i}.mlp.hook_in", f"blocks.{i}.hook_mlp_out"] for i in range(2)]
            made = [single(active, "transcoder", pair, seed=i, linear_skip=True) for i, pair in enumerate(pairs)]
            yield f"transcoders {active}", made, True
            hooks = [f"blocks.{i}.{hook}" for hook in ("mlp.hook_in", "hook_mlp_out") for i in range(3)]
            clt = filled(CompoundCrossLayerTranscoder(3, D, D, 3 * L, activation(active, 3 * L)), 0)
            yield f"CLT {active}", [about(clt, "compound_cross_layer_transcoder", hooks)], True
        return
    held = {"saelens": CONFIGS, "sparsify": ("topk", "groupmax"), "dictionary-learning": CONFIGS}[library]
    for active in held:
        if not (active == "groupmax" and library != "sparsify"):
            for pre_bias in (False, True):
                hook = ["blocks.0.hook_resid_post"]
                yield f"SAE {active} {pre_bias}", [single(active, "sae", hook, use_pre_bias=pre_bias)], False
        if library == "dictionary-learning" or (library == "saelens" and active in ("topk", "groupmax")):
            continue
        hooks = ["blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out"]
        for skip in (False, True):
            yield f"transcoder {active} {skip}", [single(active, "transcoder", hooks, linear_skip=skip)], False


def activation(active: str, n_latents: int):
    return ACTIVATIONS.build(CONFIGS[active], n_latents=n_latents)


def single(active: str, architecture: str, hookpoints: list[str], seed: int = 0, **options) -> BaseCrosscoder:
    model = SAEOrTranscoder(D, D, L, activation(active, L), **options)
    return about(filled(model, seed), architecture, hookpoints)


@torch.no_grad()
def filled(model: BaseCrosscoder, seed: int) -> BaseCrosscoder:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(parameter + 0.2 * noise if "log_threshold" in name else 0.5 * noise)
    for part in model.parts:
        part.W_dec_LXoDo[0] = 0
    batch = torch.randn(64, *model.in_dims, D, generator=generator)
    for _ in range(2):
        model.after_step(model.forward_train(batch).latents)
    model.fold_activation_scaling_into_weights_(torch.full(model.in_dims, 0.7), torch.full(model.out_dims, 0.7))
    return model.eval()


def about(model: BaseCrosscoder, architecture: str, hookpoints: list[str]) -> BaseCrosscoder:
    model.metadata = {
        "language_models": [{"path": "somebody/model", "name": "model"}],
        "hookpoints": hookpoints,
        "architecture": architecture,
    }
    return model


def environment(library: str) -> Path:
    root = Path(os.environ.get("CROSSCODE_INTEROP", "/tmp/crosscode-interop")) / library
    python = root / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(root)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", PACKAGES[library]], check=True)
    return python


def ours(group: list[BaseCrosscoder], x: torch.Tensor, has_layers: bool, of: Callable) -> torch.Tensor:
    if len(group) == 1 and not (has_layers and not group[0].in_dims):
        return of(group[0], x)
    return torch.stack([of(model, x[:, i]) for i, model in enumerate(group)], 1)


def main(library: str) -> int:
    python, n_bad = environment(library), 0
    with tempfile.TemporaryDirectory() as root:
        cases = list(models(library))
        arguments, inputs = [], []
        for number, (_, group, has_layers) in enumerate(cases):
            folder = export(group, library, Path(root) / str(number))
            n_layers = group[0].in_dims[0] if group[0].in_dims else len(group)
            shape = (32, *((n_layers,) if has_layers else ()), D)
            inputs.append(torch.randn(shape, generator=torch.Generator().manual_seed(9)))
            save_file({"x": inputs[-1]}, Path(root) / f"{number}.in")
            arguments += [str(folder), *(str(Path(root) / f"{number}.{part}") for part in ("in", "out"))]
        code = CHILD.format(body=BODIES[library].strip("\n"))
        subprocess.run([str(python), "-c", code, *arguments], check=True)
        for number, ((name, group, has_layers), x) in enumerate(zip(cases, inputs, strict=True)):
            found = load_file(Path(root) / f"{number}.out")
            expected = {
                "latents": ours(group, x, has_layers, lambda model, x: model.encode(x)).flatten(1),
                "output": ours(group, x, has_layers, lambda model, x: model(x)),
            }
            for what, mine in expected.items():
                mine = mine.detach()
                error = float((found[what] - mine).abs().max() / mine.abs().max())
                n_bad += not error < 1e-5
                print(f"{library}: {name}: {what} {error:.1e}{'' if error < 1e-5 else '  DIFFERENT'}", flush=True)
    return 1 if n_bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
