"""Language models that run with some activations replaced.

H harvest batch (sequences) · S sequence · M models · P hookpoints · D width · V vocabulary.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from crosscode.data.harvest.harvester import ActivationHarvester, positions_within_segments
from crosscode.data.harvest.hookpoints import Tap, resolve_taps
from crosscode.data.harvest.language_models import LanguageModel

Change = Callable[[Tensor], Tensor]
"""What is put in the place of an activation, which it leaves as it is."""


class Splicer:
    """One model of a harvester, run with activations of its hookpoints replaced: in TransformerBridge where the
    harvester reads it there, as the plain model with forward hooks elsewhere. What can be read can be replaced."""

    def __init__(self, harvester: ActivationHarvester, m: int):
        self.model, self._hookpoints = harvester.models[m], harvester.hookpoints
        self._bridge = harvester.bridge(m)
        self._taps = resolve_taps(self.model, self._hookpoints)

    def logits(
        self,
        tokens_HS: Tensor,
        segments_HS: Tensor | None,
        replacements: Mapping[int, Tensor] | None = None,
        mask_HS: Tensor | None = None,
    ) -> Tensor:
        """`logits_HSV` (float32), with hookpoint p replaced by `replacements[p]` (`acts_HSD`, in the space in which
        the model itself has them) where `mask_HS` holds."""
        changes: dict[int, Change] = {}
        for p, acts_HSD in (replacements or {}).items():
            assert mask_HS is not None
            changes[p] = replacement(acts_HSD, mask_HS)
        return self.logits_changed(tokens_HS, segments_HS, changes)

    @torch.no_grad()
    def logits_changed(self, tokens_HS: Tensor, segments_HS: Tensor | None, changes: Mapping[int, Change]) -> Tensor:
        """`logits_HSV` (float32), with the activation of each hookpoint p changed by `changes[p]`."""
        if self._bridge is not None:
            hooks = [(self._hookpoints[p], _Edit(change).bridge) for p, change in changes.items()]
            # The bridge warns that it computes a norm by its own formula where something inside is replaced: as it should.
            with self.model.lock, warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="A forward hook edited")
                tokens_HS = tokens_HS.to(self.model.device)
                return self._bridge.run_with_hooks(tokens_HS, fwd_hooks=hooks, return_type="logits").float()
        by_tap: list[tuple[Tap, Change]] = []
        for p, change in changes.items():
            tap = self._taps[self._hookpoints[p]]
            assert tap is not None  # else the harvester would have taken a bridge
            by_tap.append((tap, change))
        return logits_with(self.model, tokens_HS, segments_HS, by_tap)


@torch.no_grad()
def logits_with(
    model: LanguageModel,
    tokens_HS: Tensor,
    segments_HS: Tensor | None,
    changes: Iterable[tuple[Tap, Change]] = (),
) -> Tensor:
    """`logits_HSV` (float32) of the plain model, with the tensors of taps changed."""
    kwargs: dict[str, Any] = {"input_ids": tokens_HS.to(model.device), "use_cache": False}
    if segments_HS is not None:
        kwargs["position_ids"] = positions_within_segments(segments_HS).to(model.device)
    with edited(model, changes):
        return model.model(**kwargs).logits.float()


def replacement(acts_HSD: Tensor, mask_HS: Tensor) -> Change:
    """`acts_HSD` where `mask_HS` holds, without their padding where the activation is narrower."""

    def mixed(act: Tensor) -> Tensor:
        mask = mask_HS.to(act.device).reshape(*mask_HS.shape, *(1,) * (act.ndim - 2))
        return torch.where(mask, acts_HSD[..., : act[0, 0].numel()].to(act).reshape(act.shape), act)

    return mixed


@contextmanager
def edited(model: LanguageModel, changes: Iterable[tuple[Tap, Change]]) -> Iterator[None]:
    """Within the block, and in this thread, the plain model runs with the tensors of taps changed."""
    with model.running(), ExitStack() as stack:
        for tap, change in changes:
            module, edit = model.model.get_submodule(tap.module_path), _Edit(change)
            handle = (
                module.register_forward_pre_hook(edit.input, with_kwargs=True)
                if tap.side == "in"
                else module.register_forward_hook(edit.output)
            )
            stack.callback(handle.remove)
        yield


class _Edit:
    """Hooks that change a module's first input, its (first) output, or what TransformerBridge shows."""

    def __init__(self, change: Change):
        self._change = change
        self._thread = threading.get_ident()

    def input(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return None
        place = _first_tensor_place(args)
        if place is not None:
            return (*args[:place], self._change(args[place]), *args[place + 1 :]), kwargs
        names = ["hidden_states", *kwargs]
        name = next(name for name in names if isinstance(kwargs.get(name), Tensor))
        return args, {**kwargs, name: self._change(kwargs[name])}

    def output(self, _module: Any, _args: Any, output: Any) -> Any:
        if threading.get_ident() != self._thread:
            return None
        if isinstance(output, Tensor):
            return self._change(output)
        place = _first_tensor_place(output)
        assert place is not None
        return type(output)((*output[:place], self._change(output[place]), *output[place + 1 :]))

    def bridge(self, act: Tensor, hook: Any) -> Tensor:
        return self._change(act)


def _first_tensor_place(values: Sequence[Any]) -> int | None:
    return next((place for place, value in enumerate(values) if isinstance(value, Tensor)), None)
