"""One language model's run over tokens: as the plain model with forward hooks, or in TransformerBridge.

H harvest batch (sequences) · S sequence · P hookpoints.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Literal, cast

import torch

from crosscode.data.harvest.hookpoints import Tap, blocks_path, find_taps, resolve_taps, unknown_hookpoint
from crosscode.data.harvest.language_models import LanguageModel
from crosscode.errors import InputError, first_line
from crosscode.stopping import check_not_stopped

HarvestPath = Literal["auto", "modules", "bridge"]
Keep = Callable[[int, torch.Tensor], None]
_innermost: ContextVar[Keep | None] = ContextVar("innermost", default=None)


class _EnoughComputed(Exception):
    """Raised inside a forward pass once the last tensor that is wanted has been seen."""


def make_run(model: LanguageModel, hookpoints: Sequence[str], path: HarvestPath) -> ModuleRun | BridgeRun:
    taps = resolve_taps(model, hookpoints)
    missing = [name for name, tap in taps.items() if tap is None]
    if path == "bridge" or (path == "auto" and missing):
        return BridgeRun(model, hookpoints)
    if missing:
        raise InputError(f"hookpoints: {missing[0]!r} of {model.name!r} is not a module's input or output")
    return ModuleRun(model, [tap for tap in taps.values() if tap is not None])


class ModuleRun:
    """The plain model with one forward hook a hookpoint."""

    kind = "modules"

    def __init__(self, model: LanguageModel, taps_P: Sequence[Tap], *, all_must_run: bool = True) -> None:
        self.model = model
        self.taps_P = list(taps_P)
        self._all_must_run = all_must_run
        path = blocks_path(model)
        self._blocks = cast(Iterable[torch.nn.Module], model.model.get_submodule(path)) if path else ()

    def read(self, names: Sequence[str], tokens_HS: torch.Tensor) -> dict[str, torch.Tensor]:
        """The activations of those of `names` that this run knows and that come by."""
        taps = {name: tap for name, tap in find_taps(self.model).items() if name in names}
        return _collect(ModuleRun(self.model, [*taps.values()], all_must_run=False), [*taps], tokens_HS)

    def __call__(self, tokens_HS: torch.Tensor, positions_HS: torch.Tensor | None, keep: Keep) -> None:
        device = self.model.device
        kwargs: dict[str, Any] = {"input_ids": tokens_HS.to(device), "use_cache": False}
        if positions_HS is not None:
            kwargs["position_ids"] = positions_HS.to(device)
        missing = set(range(len(self.taps_P)))

        def seen(p: int, act: torch.Tensor) -> None:
            if (
                _innermost.get() is not seen
            ):  # of another thread, or of a run within this one (ablation reads the models once more)
                return
            keep(p, act)
            missing.discard(p)
            if not missing:
                raise _EnoughComputed

        with self.model.running(), torch.no_grad(), self._hooks(seen), _stopped_within(self._blocks):
            token = _innermost.set(seen)
            try:
                self.model.model(**kwargs)
            except _EnoughComputed:
                return
            finally:
                _innermost.reset(token)
        if self._all_must_run:
            silent = self.taps_P[min(missing)]
            raise InputError(f"hookpoints: module {silent.module_path!r} of {self.model.name!r} did not run")

    @contextmanager
    def _hooks(self, seen: Keep) -> Iterator[None]:
        with ExitStack() as stack:
            for p, tap in enumerate(self.taps_P):
                module = self.model.model.get_submodule(tap.module_path)

                def on_input(_module: Any, args: Any, kwargs: Any, p: int = p) -> None:
                    seen(p, _first_tensor([*args, kwargs.get("hidden_states"), *kwargs.values()]))

                def on_output(_module: Any, _args: Any, output: Any, p: int = p) -> None:
                    seen(p, _first_tensor(output if isinstance(output, tuple | list) else [output]))

                handle = (
                    module.register_forward_pre_hook(on_input, with_kwargs=True)
                    if tap.side == "in"
                    else module.register_forward_hook(on_output)
                )
                stack.callback(handle.remove)
            yield


@contextmanager
def _stopped_within(blocks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Within the block, in a thread that hears no signals, a model's run is left before the next of its blocks once one came."""
    with ExitStack() as stack:
        if threading.current_thread() is not threading.main_thread():
            for block in blocks:
                stack.callback(block.register_forward_pre_hook(lambda _module, _args: check_not_stopped()).remove)
        yield


def _first_tensor(values: Sequence[Any]) -> torch.Tensor:
    return next(value for value in values if isinstance(value, torch.Tensor))


class BridgeRun:
    """TransformerBridge's own run: every name that TransformerLens knows, at TransformerLens' speed."""

    kind = "bridge"

    def __init__(self, model: LanguageModel, hookpoints: Sequence[str]) -> None:
        self.model = model
        self.hookpoints = list(hookpoints)
        self.bridge = _boot_bridge(model)
        self._known = {*self.bridge.hook_dict, *find_taps(model)}
        for name in self.hookpoints:
            if name not in self._known:
                raise unknown_hookpoint(name, model, self._known)

    def __call__(self, tokens_HS: torch.Tensor, positions_HS: torch.Tensor | None, keep: Keep) -> None:
        if positions_HS is not None:
            raise InputError(f"segments_HS: TransformerBridge has no document isolation ({self.hookpoints})")
        cache = self._cache(self.hookpoints, tokens_HS)
        for p, name in enumerate(self.hookpoints):
            if name not in cache:
                raise InputError(f"hookpoints: {name!r} of {self.model.name!r} exists but never fires")
            keep(p, cache[name])

    def read(self, names: Sequence[str], tokens_HS: torch.Tensor) -> dict[str, torch.Tensor]:
        """The activations of those of `names` that the bridge knows and that come by."""
        cache = self._cache([name for name in names if name in self._known], tokens_HS)
        return {name: cache[name] for name in names if name in cache}

    def _cache(self, names: Sequence[str], tokens_HS: torch.Tensor) -> Any:
        layers = [_layer_of(name) for name in names]
        stop = {} if None in layers else {"stop_at_layer": max(layer for layer in layers if layer is not None) + 1}
        with self.model.lock, torch.no_grad(), _stopped_within(getattr(self.bridge, "blocks", ())):
            _, cache = self.bridge.run_with_cache(
                tokens_HS.to(self.model.device), names_filter=list(names), return_type=None, **stop
            )
        return cache


def _collect(run: ModuleRun, names: Sequence[str], tokens_HS: torch.Tensor) -> dict[str, torch.Tensor]:
    acts: dict[str, torch.Tensor] = {}

    def keep(p: int, act: torch.Tensor) -> None:
        acts[names[p]] = act.clone()

    if names:
        run(tokens_HS, None, keep)
    return acts


def _layer_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blocks" and len(parts) > 2 and parts[1].isdigit() else None


def _boot_bridge(model: LanguageModel) -> Any:
    """A bridge over a copy of the module tree: booting rewires the tree that it is given.

    It gets no tokenizer: it would load a second one by name, and token ids are all that it is given to run.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    architecture = type(model.model).__name__
    try:
        tree = model.plain_tree()
        return build_bridge_from_module(tree, architecture, hf_config=tree.config, model_name=model.name)
    except Exception as error:
        raise InputError(
            f"hookpoints: {model.name!r} ({architecture}) cannot be run in TransformerBridge: {first_line(error)}"
        ) from error
