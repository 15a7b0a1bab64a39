"""Which hookpoints circuit-tracer knows, by its two backends."""

from __future__ import annotations

from collections.abc import Sequence

from crosscode.interop.plain import PlainCoder

HOOKS = ("feature_input_hook", "feature_output_hook")
_TRANSFORMERLENS = {"hook_resid_mid", "mlp.hook_in", "mlp.hook_out", "hook_mlp_out", "ln2.hook_normalized"}
_GEMMA3 = {"ln2.hook_normalized", "hook_resid_mid", "mlp.hook_in", "hook_mlp_out"}
_NNSIGHT: dict[str, set[str]] = {
    "Gemma2ForCausalLM": {"ln2.hook_normalized", "hook_resid_mid", "hook_mlp_out"},
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": _GEMMA3,
    "LlamaForCausalLM": {"hook_resid_mid", "hook_mlp_out", "mlp.hook_in", "mlp.hook_out"},
    "Qwen3ForCausalLM": {"mlp.hook_in", "mlp.hook_out"},
    "GptOssForCausalLM": {"hook_resid_mid", "mlp.hook_in", "mlp.hook_out", "hook_mlp_out"},
}
_ONE_TENSOR = ({"hook_mlp_out", "mlp.hook_out"},)
"""Names of one tensor, but where a norm stands between MLP and residual stream (Gemma)"""


def hook_names(coders: Sequence[PlainCoder]) -> tuple[set[str], set[str]]:
    """Names within a block of what is read and of what is written, as the tables have them where they can."""
    cls = str(coders[0].language_model().get("class") or "")
    sides = ([hook for c in coders for _, hook in c.inputs], [hook for c in coders for _, hook in c.outputs])
    return tuple({_known_name(_within_block(hook), cls) for hook in side} for side in sides)  # pyright: ignore[reportReturnType]


def _within_block(hookpoint: str) -> str:
    """`blocks.3.mlp.hook_in` -> `mlp.hook_in`; another name as it is."""
    return hookpoint.split(".", 2)[2] if hookpoint.startswith("blocks.") else hookpoint


def _known_name(name: str, cls: str) -> str:
    table = _NNSIGHT.get(cls)
    if table is None or name in table or cls.startswith("Gemma"):
        return name
    same = next((names for names in _ONE_TENSOR if name in names), {name})
    return next((other for other in sorted(same) if other in table), name)


def name_problem(coders: Sequence[PlainCoder]) -> str | None:
    for side, names in zip(("reads", "writes"), hook_names(coders), strict=True):
        if len(names) > 1:
            return f"all layers have one hookpoint that is {side}, and these have {', '.join(sorted(names))}"
        (name,) = names
        if name not in _TRANSFORMERLENS:
            return (
                f"what it {side} has a name in its table, and {name!r} has not; train on "
                f"{', '.join(f'blocks.N.{known}' for known in sorted(_TRANSFORMERLENS))}"
            )
    return None


def name_note(coders: Sequence[PlainCoder]) -> str | None:
    """What works in one of its backends only."""
    cls = str(coders[0].language_model().get("class") or "")
    unknown = [name for names in hook_names(coders) for name in names if name not in _NNSIGHT.get(cls, names)]
    if not unknown:
        return None
    return (
        f"its nnsight backend does not know {unknown[0]!r} of {cls} (it knows {', '.join(sorted(_NNSIGHT[cls]))}); "
        "its transformerlens backend does"
    )
