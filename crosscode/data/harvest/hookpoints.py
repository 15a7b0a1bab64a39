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
from typing import Literal

from torch import nn

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
    *,
    ln1: str,
    ln2: str,
    attn: str,
    attn_out: str,
    mlp: str,
    mlp_out: str,
    mlp_pre: str,
    embed: str,
    ln_final: str,
    mlp_up: str | None = None,
    qkv: tuple[str, str, str] | None = None,
    post_norms: Mapping[str, str] | None = None,
    has_resid_mid: bool = True,
) -> Family:
    modules = {"ln1": ln1, "ln2": ln2, "attn": attn, "mlp": mlp, "attn.o": attn_out, "mlp.out": mlp_out}
    modules |= dict(post_norms or {})
    modules |= {"mlp.gate": mlp_pre, "mlp.in": mlp_up} if mlp_up else {"mlp.in": mlp_pre}
    block = {f"{name}.hook_{side}": Tap(path, side) for name, path in modules.items() for side in ("in", "out")}
    block |= {
        "hook_attn_out": block["ln1_post.hook_out" if post_norms else "attn.hook_out"],
        "hook_mlp_out": block["ln2_post.hook_out" if post_norms else "mlp.hook_out"],
        "attn.hook_z": block["attn.o.hook_in"],
        "mlp.hook_post": block["mlp.out.hook_in"],
        "mlp.hook_pre": Tap(mlp_pre, "out"),
    }
    if mlp_up:
        block["mlp.hook_pre_linear"] = Tap(mlp_up, "out")
    if has_resid_mid:
        block["hook_resid_mid"] = block["ln2.hook_in"]
    for letter, path in zip("qkv", qkv or (), strict=False):
        block |= {f"attn.hook_{letter}": Tap(path, "out"), f"attn.{letter}.hook_out": Tap(path, "out")}
    outside = {
        "hook_embed": Tap(embed, "out"),
        "embed.hook_out": Tap(embed, "out"),
        "ln_final.hook_in": Tap(ln_final, "in"),
        "ln_final.hook_out": Tap(ln_final, "out"),
    }
    return Family(block, outside)


def _gated_family(ln2: str, post_norms: Mapping[str, str] | None = None) -> Family:
    """Llama and its relatives: the modules have one set of names, the norms around them differ."""
    return _family(
        ln1="input_layernorm",
        ln2=ln2,
        attn="self_attn",
        attn_out="self_attn.o_proj",
        mlp="mlp",
        mlp_pre="mlp.gate_proj",
        mlp_up="mlp.up_proj",
        mlp_out="mlp.down_proj",
        embed="model.embed_tokens",
        ln_final="model.norm",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        post_norms=post_norms,
    )


_LLAMA = _gated_family("post_attention_layernorm")
_GEMMA2 = _gated_family(
    "pre_feedforward_layernorm",
    {"ln1_post": "post_attention_layernorm", "ln2_post": "post_feedforward_layernorm"},
)
_GPT2 = _family(
    ln1="ln_1",
    ln2="ln_2",
    attn="attn",
    attn_out="attn.c_proj",
    mlp="mlp",
    mlp_pre="mlp.c_fc",
    mlp_out="mlp.c_proj",
    embed="transformer.wte",
    ln_final="transformer.ln_f",
)
_NEOX = _family(
    ln1="input_layernorm",
    ln2="post_attention_layernorm",
    attn="attention",
    attn_out="attention.dense",
    mlp="mlp",
    mlp_pre="mlp.dense_h_to_4h",
    mlp_out="mlp.dense_4h_to_h",
    embed="gpt_neox.embed_in",
    ln_final="gpt_neox.final_layer_norm",
    has_resid_mid=False,
)
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
}
_EVERY_BLOCK: dict[str, Side] = {
    "hook_resid_pre": "in",
    "hook_in": "in",
    "hook_resid_post": "out",
    "hook_out": "out",
}


def find_taps(model: LanguageModel) -> dict[str, Tap]:
    """Every TransformerLens name of `model` that is the input or output of one module."""
    blocks_path = _find_blocks(model)
    family = FAMILIES.get(model.config.model_type)
    modules = dict(model.model.named_modules())
    taps = {name: tap for name, tap in (family.outside if family else {}).items() if tap.module_path in modules}
    for layer in range(model.n_layers if blocks_path else 0):
        path = f"{blocks_path}.{layer}"
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


def unknown_hookpoint(name: str, model: LanguageModel, known: Iterable[str]) -> InputError:
    """The error for a name that `model` does not have, with the nearest names that it has."""
    near = difflib.get_close_matches(name, list(known), n=4, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "names look like blocks.3.hook_resid_post"
    return InputError(
        f"hookpoints: {name!r} is not a hookpoint of {model.name!r} ({model.n_layers} layers, "
        f"blocks.0 to blocks.{model.n_layers - 1}); {hint}"
    )


def _find_blocks(model: LanguageModel) -> str | None:
    """Path of the list of decoder blocks: the one ModuleList nearest to the root with an entry a layer, if unique."""
    lists = [
        path
        for path, module in model.model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == model.n_layers
    ]
    depth = min((path.count(".") for path in lists), default=0)
    nearest = [path for path in lists if path.count(".") == depth]
    return nearest[0] if len(nearest) == 1 else None
