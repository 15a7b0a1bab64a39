"""What a harvest takes on trust, tried once on a handful of tokens: one vector a position, no look ahead, names that say
what they give.

H sequences · S sequence · D width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from crosscode.data.harvest.language_models import LanguageModel
from crosscode.data.harvest.model_runs import BridgeRun, ModuleRun
from crosscode.errors import InputError, RankLost, first_line

_TOKENS = 11
"""No model has as many attention heads, so that a tensor of (2, heads, ...) is not taken for one of (2, tokens, ...)."""
_BLOCK_NAME = re.compile(r"(blocks\.\d+)\.(.+)")
_SUMMANDS = ("hook_attn_out", "hook_mlp_out", "hook_resid_mid")
_NEURONS = {"mlp.hook_pre": "mlp.hook_in", "mlp.hook_pre_linear": "mlp.hook_in", "mlp.hook_post": "mlp.hook_out"}
"""Names of neurons, and what a module without neurons of its own (a mixture of experts) gives in their place."""


def probe_widths(run: ModuleRun | BridgeRun, hookpoints: Sequence[str]) -> tuple[int, ...]:
    """The width of each hookpoint, from the activations themselves: a name does not tell d_model from d_mlp.

    Two sequences that begin alike and end apart. Raises InputError for what is not one vector a position of each
    sequence, and where a later token reaches an earlier position: then padding would.
    """
    model = run.model
    S = min(_TOKENS, model.max_sequence_length or _TOKENS)
    n_alike = S // 2
    tokens_HS = random_tokens(model, 2, S)
    tokens_HS[1, :n_alike] = tokens_HS[0, :n_alike]
    acts: dict[int, torch.Tensor] = {}

    def keep(p: int, act: torch.Tensor) -> None:
        if act.ndim < 3 or act.shape[:2] != tokens_HS.shape:
            raise InputError(
                f"hookpoints: {hookpoints[p]!r} of {model.name!r} gives a tensor of shape {tuple(act.shape)} for "
                f"2 x {S} tokens; (2, {S}, width) is needed"
            )
        acts[p] = act.clone()

    with in_words(f"hookpoints: {', '.join(hookpoints)} of {model.name!r} cannot be read"):
        run(tokens_HS, None, keep)
    for p, act in acts.items():
        one, two = act[:, :n_alike].flatten(2)
        if not same(one, two, model):
            raise InputError(
                f"hookpoints: {hookpoints[p]!r} of {model.name!r} ({type(model.model).__name__}) sees later tokens (its "
                "attention is bidirectional), and padding and neighbours with them; causal models, or a hookpoint "
                "before the first attention, can be harvested"
            )
    return tuple(acts[p][0, 0].numel() for p in range(len(hookpoints)))


def check_names(run: ModuleRun | BridgeRun, hookpoints: Sequence[str]) -> None:
    """Raise InputError for a hookpoint that is not what its name says, as far as other names of its block can tell.

    What attention and MLP give is what the residual stream receives: pre + attention = mid, mid + mlp = post. Neurons
    are not what goes into or comes out of the whole MLP.
    """
    asked = [(name, *found.groups()) for name in hookpoints if (found := _BLOCK_NAME.fullmatch(name))]
    asked = [(name, block, part) for name, block, part in asked if part in (*_SUMMANDS, *_NEURONS)]
    if not asked:
        return
    parts = ("hook_resid_pre", "hook_resid_post", *_SUMMANDS, *_NEURONS, *_NEURONS.values())
    wanted = [f"{block}.{part}" for block in dict.fromkeys(block for _, block, _ in asked) for part in parts]
    model = run.model
    S = min(_TOKENS, model.max_sequence_length or _TOKENS)
    with in_words(f"hookpoints: {asked[0][0]!r} of {model.name!r} cannot be read"):
        acts = run.read([*wanted, *(name for name, _, _ in asked)], random_tokens(model, 2, S))
    for name, block, part in asked:
        of_block = {other[len(block) + 1 :]: act for other, act in acts.items() if other.startswith(f"{block}.")}
        if part in _NEURONS:
            whole = of_block.get(_NEURONS[part])
            if whole is not None and whole.shape == of_block[part].shape and torch.equal(whole, of_block[part]):
                raise InputError(
                    f"hookpoints: {name!r} of {model.name!r} is not the MLP's neurons but {block}.{_NEURONS[part]}: "
                    "name that, or a module's path"
                )
            if part != "mlp.hook_post" and _give_neurons(of_block, model) is False:
                raise InputError(
                    f"hookpoints: {name!r} of {model.name!r} is not what its name says: the MLP's neurons "
                    "(mlp.hook_post) do not follow from it by the activation function alone (a factor stands between); name "
                    "the module that is meant by its path, or mlp.hook_post"
                )
        elif _is_received(part, of_block, torch.finfo(model.dtype).eps) is False:
            raise InputError(
                f"hookpoints: {name!r} of {model.name!r} is not what its name says: in this model the residual stream "
                "before and after the block do not differ by attention and MLP alone as they come out of their modules; "
                "name the module that is meant by its path, or hook_resid_pre or hook_resid_post"
            )


def _give_neurons(acts: dict[str, torch.Tensor], model: LanguageModel) -> bool | None:
    """Whether act(pre) (x pre_linear) = post; None where that cannot be told."""
    from transformers.activations import ACT2FN

    names = ("hidden_activation", "hidden_act", "activation_function", "activation")
    found = next((value for name in names if (value := getattr(model.config, name, None)) in ACT2FN), None)
    pre, linear, post = (acts.get(name) for name in ("mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post"))
    if found is None or pre is None or post is None or pre.shape != post.shape:
        return None
    expected = ACT2FN[found](pre.double()) * (1 if linear is None else linear.double())
    error, eps = (expected - post.double()).norm(), torch.finfo(model.dtype).eps
    return bool(error <= (0.01 + 16 * eps) * post.double().norm())


def _is_received(part: str, acts: dict[str, torch.Tensor], eps: float) -> bool | None:
    """Whether one of the sums that `part` belongs to holds; None where no sum has all its names."""
    names = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
    # Some models run their MLP on (sequences x positions, width).
    pre, attn, mid, mlp, post = (None if name not in acts else acts[name].double().flatten(0, -2) for name in names)
    sums = {"hook_attn_out": [((pre, attn), mid)], "hook_mlp_out": [((mid, mlp), post)]}
    sums["hook_resid_mid"] = sums["hook_attn_out"] + sums["hook_mlp_out"]
    if mid is None:  # attention and MLP side by side
        sums = {name: [((pre, attn, mlp), post)] for name in sums}
    verdicts = []
    for summands, total in sums[part]:
        given = [act for act in (*summands, total) if act is not None]
        if len(given) == len(summands) + 1:
            *of_sum, whole = given
            error, share = (whole - sum(of_sum)).norm(), min(act.norm() for act in of_sum)
            scale = max(act.norm() for act in given)
            verdicts.append(bool(error <= 0.01 * share + 4 * eps * scale))
    return any(verdicts) if verdicts else None


def random_tokens(model: LanguageModel, H: int, S: int) -> torch.Tensor:
    """Of ids that the model does not take for padding: some count no position there."""
    tokens_HS = torch.randint(model.vocab_size, (H, S), generator=torch.Generator().manual_seed(0))
    pad_id = getattr(model.config, "pad_token_id", None)
    tokens_HS[tokens_HS == pad_id] = 0 if pad_id else model.vocab_size - 1
    return tokens_HS


def same(one_SD: torch.Tensor, two_SD: torch.Tensor, model: LanguageModel) -> bool:
    """Whether each position is the same, but for the model's rounding as its layers amplify it."""
    one_SD, two_SD = one_SD.double(), two_SD.double()
    rounding = min(64 * torch.finfo(model.dtype).eps, 0.05)
    return bool(((one_SD - two_SD).norm(dim=1) <= rounding * one_SD.norm(dim=1)).all())


@contextmanager
def in_words(place: str) -> Iterator[None]:
    """What a model raises on a trial, in one line."""
    try:
        yield
    except (InputError, RankLost):
        raise
    except Exception as error:
        raise InputError(f"{place}: {type(error).__name__}: {first_line(error)}") from error
