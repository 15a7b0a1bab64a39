"""A language model that ranks hold together, split by the tensor-parallel plan that `transformers` has for its class: all of them
run it over the same tokens at the same time, and what they read of it must be whole on each.

A plan names modules and how they are split: the products that go into attention and MLP by their outputs, those that come out
by their inputs, so that what stands between is a part of the heads or neurons. Everything else is whole.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import distributed as dist

from crosscode.data.harvest.hookpoints import Tap, resolve_taps
from crosscode.data.harvest.language_models import LanguageModel
from crosscode.errors import InputError

_BOTH = frozenset({"in", "out"})
_WHOLE_SIDES: dict[str, Collection[str]] = {
    "colwise": {"in"}, "packed_colwise": {"in"}, "rowwise": {"out"},
    **dict.fromkeys(("colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep", "embedding_rowwise",
                     "embedding_colwise", "all_reduce", "moe_tp_experts", "mla_kv_a_proj"), _BOTH),
}  # fmt: skip
"""By style of a module, which of its sides are whole on each rank. Of other styles that is not known."""
_SPLIT_WEIGHTS = ("colwise", "rowwise", "packed", "embedding")
"""How the names of styles begin that split the weights of a module."""
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def check_tensor_parallel(skeleton: LanguageModel, hookpoints: Sequence[str], n_ranks: int) -> None:
    """Raise `InputError` where `n_ranks` cannot hold this model together, or a hookpoint would not be whole on each."""
    model, field = skeleton.model, f"parallel.model = {n_ranks}"
    plan, kind = _plan_of(model), type(model).__name__
    if not plan:
        raise InputError(
            f"{field}: transformers has no tensor-parallel plan for {kind} ({skeleton.name!r}); leave it 1"
        )
    if any("att" in name for name, style in plan.items() if style in _WHOLE_SIDES):
        for name in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(skeleton.config, name, None)
            if any(n % n_ranks for n in (heads if isinstance(heads, list) else [heads or n_ranks])):
                raise InputError(f"{field}: must divide {name} = {heads} of {skeleton.name!r}")
    for name, tap in resolve_taps(skeleton, hookpoints).items():
        if tap is None:
            raise InputError(f"{field}: {name!r} of {skeleton.name!r} is read in TransformerBridge, which is not split")
        if not is_whole(plan, tap):
            raise InputError(
                f"{field}: {name!r} of {skeleton.name!r} is not whole on a process, as attention and MLP are split inside; "
                "name what goes into them or comes out of them (hook_attn_out, hook_mlp_out), or the residual stream"
            )


def is_whole(plan: Mapping[str, str], tap: Tap) -> bool:
    """Whether each rank sees all of what comes by there."""
    path = _NUMBER.sub(".*", tap.module_path)
    if (style := plan.get(path)) in _WHOLE_SIDES:
        return tap.side in _WHOLE_SIDES[style]
    # What holds a module that gives or takes a part holds parts.
    split = {name for name, style in plan.items() if _WHOLE_SIDES.get(style) != _BOTH}
    inside = {name.rpartition(".")[0] for name in split} - {""}
    return path not in split and not any(path.startswith(f"{place}.") for place in inside)


def n_weights_of_a_rank(skeleton: LanguageModel, n_ranks: int) -> int:
    """Of the model's weights, those that one of so many ranks holds."""
    plan, held = (_plan_of(skeleton.model) if n_ranks > 1 else {}), 0
    for name, weight in skeleton.model.named_parameters():
        path = _NUMBER.sub(".*", name)
        style = plan.get(path) or plan.get(path.rpartition(".")[0]) or ""
        is_whole_bias = weight.ndim == 1 and "rowwise" in style and "embedding" not in style
        is_split = style.startswith(_SPLIT_WEIGHTS) and not is_whole_bias
        held += -(-weight.numel() // n_ranks) if is_split else weight.numel()
    return held


def distributed_config(n_ranks: int) -> Any:
    """What `from_pretrained` takes, so that each `n_ranks` consecutive ranks hold the model together.

    Raises:
        InputError: this version of `transformers` cannot.
    """
    try:
        from transformers.distributed.configuration_utils import DistributedConfig

        class Copies(DistributedConfig):
            """Groups of ranks that share nothing: `transformers` would split what they hold alike (FSDP)."""

            @property
            def dp_size(self) -> int:
                return 1

        return Copies(tp_size=n_ranks, dp_replicate_size=dist.get_world_size() // n_ranks)
    except (ImportError, TypeError) as error:
        raise InputError(
            f"parallel.model = {n_ranks}: needs a newer transformers (it is tested with 5.23), whose DistributedConfig has "
            "copies of what is split"
        ) from error


def _plan_of(model: Any) -> dict[str, str]:
    return dict(getattr(model, "tp_plan", None) or {})
