"""Tokens in, activations out: several models, several hookpoints, one tensor.

H harvest batch (sequences) · S sequence · M models · P hookpoints · D model dimension.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch

from crosscode.data.harvest.hookpoints import Tap, find_taps, resolve_taps, unknown_hookpoint
from crosscode.data.harvest.language_models import DTYPES, LanguageModel, check_common_tokenizer
from crosscode.errors import InputError, first_line

HarvestPath = Literal["auto", "modules", "bridge"]
Keep = Callable[[int, torch.Tensor], None]
_RESIDUAL_NUMBERS_PER_THREAD = 3 << 17
_PROBE_TOKENS = 11
"""No model has as many attention heads, so that a tensor of (1, heads, ...) is not taken for one of (1, tokens, ...)."""


class _EnoughComputed(Exception):
    """Raised inside a forward pass once the last tensor that is wanted has been seen."""


class ActivationHarvester:
    """Runs M language models over tokens and keeps P activations of each.

    A model whose hookpoints are all inputs or outputs of modules runs as the plain `transformers` model with forward
    hooks and stops right after the last one has fired; otherwise that model runs in TransformerBridge
    (`path="modules"` or `"bridge"` insists on one of them). `dtype` and `device` are those of the returned tensor;
    each model runs in its own dtype, on its own device.

    Raises InputError for an unknown or repeated hookpoint, different tokenizers, or unequal widths.
    """

    def __init__(
        self,
        models: Sequence[LanguageModel],
        hookpoints: Sequence[str],
        *,
        dtype: str = "float32",
        device: str | torch.device | None = None,
        path: HarvestPath = "auto",
    ) -> None:
        if not models:
            raise InputError("models: at least one language model is needed")
        if not hookpoints:
            raise InputError("hookpoints: at least one is needed, such as blocks.0.hook_resid_post")
        repeated = sorted({name for name in hookpoints if list(hookpoints).count(name) > 1})
        if repeated:
            raise InputError(f"hookpoints: {repeated[0]!r} is named twice")
        if dtype not in DTYPES:
            raise InputError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
        check_common_tokenizer(models)
        self.models = list(models)
        self.hookpoints = list(hookpoints)
        self.dtype = DTYPES[dtype]
        self.device = torch.device(device) if device is not None else models[0].device
        self._runs = [_make_run(model, self.hookpoints, path) for model in self.models]
        self.widths_MP = [self._probe_widths(m) for m in range(len(self.models))]
        self._check_widths()

    @property
    def dims(self) -> tuple[int, int, int]:
        """(M, P, D)."""
        return len(self.models), len(self.hookpoints), self.widths_MP[0][0]

    @property
    def paths(self) -> list[str]:
        """How each model is read: "modules" or "bridge"."""
        return [run.kind for run in self._runs]

    def bridge(self, m: int) -> Any | None:
        """The TransformerBridge in which model m is read; None where it runs as the plain model."""
        run = self._runs[m]
        return run.bridge if isinstance(run, _BridgeRun) else None

    @property
    def max_sequence_length(self) -> int | None:
        limits = [model.max_sequence_length for model in self.models]
        return min((limit for limit in limits if limit), default=None)

    @property
    def vocab_size(self) -> int:
        return min(model.vocab_size for model in self.models)

    def harvest(self, tokens_HS: torch.Tensor, segments_HS: torch.Tensor | None = None) -> torch.Tensor:
        """Activations `acts_HSMPD` of `tokens_HS` (int64), in `dtype` on `device`.

        `segments_HS` (int64): number of the document that each position belongs to, growing along the sequence; then
        attention stays within a document and positions count from its start. Sequences are padded on the right, so
        that padding cannot reach earlier positions.
        """
        if tokens_HS.ndim != 2 or tokens_HS.shape[1] == 0:
            raise InputError(f"tokens_HS: shape {tuple(tokens_HS.shape)} should be (sequences, positions)")
        H, S = tokens_HS.shape
        self._check_tokens(tokens_HS)
        positions_HS = None if segments_HS is None else positions_within_segments(segments_HS)
        out_HSMPD = torch.empty((H, S, *self.dims), dtype=self.dtype, device=self.device)
        for m, run in enumerate(self._runs):
            n_at_once = _sequences_at_once(run.model, H, S)
            for first in range(0, H, n_at_once):
                part = slice(first, first + n_at_once)

                def keep(p: int, act: torch.Tensor, out_HSMPD: torch.Tensor = out_HSMPD[part], m: int = m) -> None:
                    out_HSMPD[:, :, m, p] = act.reshape(*out_HSMPD.shape[:2], -1)

                run(tokens_HS[part], None if positions_HS is None else positions_HS[part], keep)
        return out_HSMPD

    def _check_tokens(self, tokens_HS: torch.Tensor) -> None:
        limit = self.max_sequence_length
        if limit is not None and tokens_HS.shape[1] > limit:
            raise InputError(f"sequence_length: {tokens_HS.shape[1]} is above the models' limit of {limit} positions")
        if tokens_HS.is_cuda or not tokens_HS.numel():
            return
        least, largest = (int(end) for end in tokens_HS.aminmax())
        if least < 0 or largest >= self.vocab_size:
            wrong = least if least < 0 else largest
            raise InputError(f"tokens: id {wrong} is outside the vocabulary of {self.vocab_size}")

    def _probe_widths(self, m: int) -> list[int]:
        """Widths come from the activations themselves: a name does not tell whether it is d_model or d_mlp wide."""
        widths_P = [0] * len(self.hookpoints)
        S = min(_PROBE_TOKENS, self.models[m].max_sequence_length or _PROBE_TOKENS)
        tokens_HS = torch.zeros((1, S), dtype=torch.long)

        def keep(p: int, act: torch.Tensor) -> None:
            if act.ndim < 3 or act.shape[:2] != tokens_HS.shape:
                raise InputError(
                    f"hookpoints: {self.hookpoints[p]!r} of {self.models[m].name!r} gives a tensor of shape "
                    f"{tuple(act.shape)} for 1 x {S} tokens; (1, {S}, width) is needed"
                )
            widths_P[p] = act[0, 0].numel()

        self._runs[m](tokens_HS, None, keep)
        return widths_P

    def _check_widths(self) -> None:
        d_model = self.widths_MP[0][0]
        for model, widths_P in zip(self.models, self.widths_MP, strict=True):
            for name, width in zip(self.hookpoints, widths_P, strict=True):
                if width != d_model:
                    raise InputError(
                        f"hookpoints: {name!r} of {model.name!r} is {width} wide, but {self.hookpoints[0]!r} of "
                        f"{self.models[0].name!r} is {d_model} wide; all must have the same width"
                    )


def check_hookpoints(model: LanguageModel, hookpoints: Sequence[str]) -> None:
    """Raise InputError for a name that `model` does not have, with near matches. A skeleton is enough."""
    _make_run(model, hookpoints, "auto")


def _sequences_at_once(model: LanguageModel, H: int, S: int) -> int:
    """On a CPU, so few that what a block of the model computes stays in memory that the process holds already: larger
    tensors are new to the operating system each time, which costs about a seventh of a harvest."""
    if model.device.type != "cpu":
        return max(1, H)
    return max(1, _RESIDUAL_NUMBERS_PER_THREAD * torch.get_num_threads() // (model.d_model * S))


def positions_within_segments(segments_HS: torch.Tensor) -> torch.Tensor:
    """0, 1, 2, ... from the start of each segment: `transformers` derives the block-diagonal mask from these."""
    S = segments_HS.shape[1]
    index_S = torch.arange(S, device=segments_HS.device)
    starts_HS = torch.ones_like(segments_HS, dtype=torch.bool)
    starts_HS[:, 1:] = segments_HS[:, 1:] != segments_HS[:, :-1]
    start_index_HS = torch.where(starts_HS, index_S, 0).cummax(dim=1).values
    return index_S - start_index_HS


def _make_run(model: LanguageModel, hookpoints: Sequence[str], path: HarvestPath) -> _ModuleRun | _BridgeRun:
    taps = resolve_taps(model, hookpoints)
    missing = [name for name, tap in taps.items() if tap is None]
    if path == "bridge" or (path == "auto" and missing):
        return _BridgeRun(model, hookpoints)
    if missing:
        raise InputError(f"hookpoints: {missing[0]!r} of {model.name!r} is not a module's input or output")
    return _ModuleRun(model, [tap for tap in taps.values() if tap is not None])


class _ModuleRun:
    """The plain model with one forward hook a hookpoint."""

    kind = "modules"

    def __init__(self, model: LanguageModel, taps_P: Sequence[Tap]) -> None:
        self.model = model
        self.taps_P = list(taps_P)

    def __call__(self, tokens_HS: torch.Tensor, positions_HS: torch.Tensor | None, keep: Keep) -> None:
        device = self.model.device
        kwargs: dict[str, Any] = {"input_ids": tokens_HS.to(device), "use_cache": False}
        if positions_HS is not None:
            kwargs["position_ids"] = positions_HS.to(device)
        missing = set(range(len(self.taps_P)))
        this_thread = threading.get_ident()

        def seen(p: int, act: torch.Tensor) -> None:
            if threading.get_ident() != this_thread:
                return
            keep(p, act)
            missing.discard(p)
            if not missing:
                raise _EnoughComputed

        with self.model.lock, torch.no_grad(), self._hooks(seen):
            try:
                self.model.model(**kwargs)
            except _EnoughComputed:
                return
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


def _first_tensor(values: Sequence[Any]) -> torch.Tensor:
    return next(value for value in values if isinstance(value, torch.Tensor))


class _BridgeRun:
    """TransformerBridge's own run: every name that TransformerLens knows, at TransformerLens' speed."""

    kind = "bridge"

    def __init__(self, model: LanguageModel, hookpoints: Sequence[str]) -> None:
        self.model = model
        self.hookpoints = list(hookpoints)
        self.bridge = _boot_bridge(model)
        known = {*self.bridge.hook_dict, *find_taps(model)}
        for name in self.hookpoints:
            if name not in known:
                raise unknown_hookpoint(name, model, known)
        layers = [_layer_of(name) for name in self.hookpoints]
        self.stop_at_layer = None if None in layers else max(layer for layer in layers if layer is not None) + 1

    def __call__(self, tokens_HS: torch.Tensor, positions_HS: torch.Tensor | None, keep: Keep) -> None:
        if positions_HS is not None:
            raise InputError(f"segments_HS: TransformerBridge has no document isolation ({self.hookpoints})")
        stop = {} if self.stop_at_layer is None else {"stop_at_layer": self.stop_at_layer}
        with self.model.lock, torch.no_grad():
            _, cache = self.bridge.run_with_cache(
                tokens_HS.to(self.model.device), names_filter=self.hookpoints, return_type=None, **stop
            )
        for p, name in enumerate(self.hookpoints):
            if name not in cache:
                raise InputError(f"hookpoints: {name!r} of {self.model.name!r} exists but never fires")
            keep(p, cache[name])


def _layer_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blocks" and len(parts) > 2 and parts[1].isdigit() else None


def _boot_bridge(model: LanguageModel) -> Any:
    """A bridge over a copy of the module tree that shares every weight: booting rewires the tree that it is given.

    It gets no tokenizer: it would load a second one by name, and token ids are all that it is given to run.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    tensors = [*model.model.parameters(), *model.model.buffers()]
    tree = copy.deepcopy(model.model, {id(tensor): tensor for tensor in tensors})
    architecture = type(model.model).__name__
    try:
        return build_bridge_from_module(tree, architecture, hf_config=tree.config, model_name=model.name)
    except (ValueError, KeyError, NotImplementedError, AttributeError, TypeError, OSError) as error:
        raise InputError(
            f"hookpoints: {model.name!r} ({architecture}) cannot be run in TransformerBridge: {first_line(error)}"
        ) from error
