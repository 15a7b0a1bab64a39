"""TransformerLens names <-> the inputs and outputs of plain `transformers` modules.

A hookpoint whose tensor is what one module takes or returns is a `Tap` and is read with a forward hook, at the speed
of the plain model. The block's input and output (`hook_resid_pre`, `hook_resid_post`) are taps on every decoder;
the other names are written down per family, because a module of the same name means different things in different
families. Module paths of the model itself ("model.layers.3.mlp", optionally with ":in") are taps too. What is not a
tap is left to TransformerBridge.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn

from crosscode.data.harvest.language_models import LanguageModel
from crosscode.errors import InputError

Side = Literal["in", "out"]


@dataclass(frozen=True)
class Tap:
    """One side of one module: its first input, or its (first) output."""

    module_path: str
    side: Side


@dataclass(frozen=True)
class Family:
    """Where the tensors of a block are: `block` maps a name within a block to a module path within it."""

    block: Mapping[str, Tap]
    outside: Mapping[str, Tap]


def _family(
    modules: Mapping[str, str],
    embed: str,
    ln_final: str,
    *,
    qkv: Mapping[str, str] | None = None,
    resid_mid: bool = True,
) -> Family:
    """`modules`: the path within a block of each component that TransformerLens names. Gated MLPs have `mlp.gate`, norms
    after attention and MLP `ln1_post` and `ln2_post`. `resid_mid`: whether the second norm reads the stream between."""
    block = {f"{name}.hook_{side}": Tap(path, side) for name, path in modules.items() for side in ("in", "out")}
    block |= {
        "hook_attn_out": block["ln1_post.hook_out" if "ln1_post" in modules else "attn.hook_out"],
        "hook_mlp_out": block["ln2_post.hook_out" if "ln2_post" in modules else "mlp.hook_out"],
        "attn.hook_z": block["attn.o.hook_in"],
        "mlp.hook_post": block["mlp.out.hook_in"],
        "mlp.hook_pre": block["mlp.gate.hook_out" if "mlp.gate" in modules else "mlp.in.hook_out"],
    }
    if "mlp.gate" in modules:
        block["mlp.hook_pre_linear"] = block["mlp.in.hook_out"]
    if resid_mid:
        block["hook_resid_mid"] = block["ln2.hook_in"]
    for letter, path in (qkv or {}).items():
        block |= {f"attn.hook_{letter}": Tap(path, "out"), f"attn.{letter}.hook_out": Tap(path, "out")}
    outside = {
        "hook_embed": Tap(embed, "out"),
        "embed.hook_out": Tap(embed, "out"),
        "ln_final.hook_in": Tap(ln_final, "in"),
        "ln_final.hook_out": Tap(ln_final, "out"),
    }
    return Family(block, outside)


_LLAMA_MODULES = {
    "ln1": "input_layernorm", "ln2": "post_attention_layernorm", "attn": "self_attn", "attn.o": "self_attn.o_proj",
    "mlp": "mlp", "mlp.gate": "mlp.gate_proj", "mlp.in": "mlp.up_proj", "mlp.out": "mlp.down_proj",
}  # fmt: skip
_GEMMA2_MODULES = {
    **_LLAMA_MODULES, "ln2": "pre_feedforward_layernorm",
    "ln1_post": "post_attention_layernorm", "ln2_post": "post_feedforward_layernorm",
}  # fmt: skip
_GPT2_MODULES = {
    "ln1": "ln_1", "ln2": "ln_2", "attn": "attn", "attn.o": "attn.c_proj",
    "mlp": "mlp", "mlp.in": "mlp.c_fc", "mlp.out": "mlp.c_proj",
}  # fmt: skip
_NEOX_MODULES = {
    "ln1": "input_layernorm", "ln2": "post_attention_layernorm", "attn": "attention", "attn.o": "attention.dense",
    "mlp": "mlp", "mlp.in": "mlp.dense_h_to_4h", "mlp.out": "mlp.dense_4h_to_h",
}  # fmt: skip
_QKV = {letter: f"self_attn.{letter}_proj" for letter in "qkv"}
_LLAMA = _family(_LLAMA_MODULES, "model.embed_tokens", "model.norm", qkv=_QKV)
_GEMMA2 = _family(_GEMMA2_MODULES, "model.embed_tokens", "model.norm", qkv=_QKV)
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "gpt2": _family(_GPT2_MODULES, "transformer.wte", "transformer.ln_f"),
    "gpt_neox": _family(_NEOX_MODULES, "gpt_neox.embed_in", "gpt_neox.final_layer_norm", resid_mid=False),
}
_EVERY_BLOCK: dict[str, Side] = {
    "hook_resid_pre": "in",
    "hook_in": "in",
    "hook_resid_post": "out",
    "hook_out": "out",
}


def find_taps(model: LanguageModel) -> dict[str, Tap]:
    """Every TransformerLens name of `model` that is the input or output of one module."""
    path_of_blocks = blocks_path(model)
    family = FAMILIES.get(model.config.model_type)
    modules = dict(model.model.named_modules())
    taps = {name: tap for name, tap in (family.outside if family else {}).items() if tap.module_path in modules}
    for layer in range(model.n_layers if path_of_blocks else 0):
        path = f"{path_of_blocks}.{layer}"
        taps |= {f"blocks.{layer}.{name}": Tap(path, side) for name, side in _EVERY_BLOCK.items()}
        for name, tap in (family.block if family else {}).items():
            if f"{path}.{tap.module_path}" in modules:
                taps[f"blocks.{layer}.{name}"] = Tap(f"{path}.{tap.module_path}", tap.side)
    return taps


def resolve_taps(model: LanguageModel, hookpoints: Iterable[str]) -> dict[str, Tap | None]:
    """The tap of each name, or None for a name that only TransformerBridge may know.

    Raises InputError for a layer that the model does not have.
    """
    taps = find_taps(model)
    modules = dict(model.model.named_modules())
    resolved: dict[str, Tap | None] = {}
    for name in hookpoints:
        path, _, side = name.partition(":")
        if name in taps:
            resolved[name] = taps[name]
        elif path in modules and path and side in ("", "in", "out"):
            resolved[name] = Tap(path, "in" if side == "in" else "out")
        else:
            layer = re.match(r"blocks\.(\d+)\.", name)
            if layer and int(layer[1]) >= model.n_layers:
                raise unknown_hookpoint(name, model, taps)
            resolved[name] = None
    return resolved


def told_widths(model: LanguageModel, hookpoints: Iterable[str]) -> list[int | None]:
    """What is known of each before the model has run: of a projection what it takes or gives, d_model at other modules that
    have a TransformerLens name; None: activations alone tell. A skeleton is enough."""
    known, found = find_taps(model), list[int | None]()
    for name, tap in resolve_taps(model, hookpoints).items():
        module = None if tap is None else model.model.get_submodule(tap.module_path)
        side = "in" if tap is None else tap.side
        if isinstance(module, nn.Embedding):
            found.append(module.embedding_dim)
        elif type(module).__name__ == "Conv1D":  # of transformers, which has no names for its sides
            found.append(cast(Tensor, cast(nn.Module, module).weight).shape[side == "out"])
        else:
            otherwise = model.d_model if name in known else None
            found.append(getattr(module, f"{side}_features", otherwise))
    return found


def unknown_hookpoint(name: str, model: LanguageModel, known: Iterable[str]) -> InputError:
    """The error for a name that `model` does not have, with the nearest names that it has."""
    near = difflib.get_close_matches(name, list(known), n=4, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "names look like blocks.3.hook_resid_post"
    return InputError(
        f"hookpoints: {name!r} is not a hookpoint of {model.name!r} ({model.n_layers} layers, "
        f"blocks.0 to blocks.{model.n_layers - 1}); {hint}"
    )


def blocks_path(model: LanguageModel) -> str | None:
    """Path of the list of decoder blocks: the one ModuleList nearest to the root with an entry a layer, if unique."""
    lists = [
        path
        for path, module in model.model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == model.n_layers
    ]
    depth = min((path.count(".") for path in lists), default=0)
    nearest = [path for path in lists if path.count(".") == depth]
    return nearest[0] if len(nearest) == 1 else None
