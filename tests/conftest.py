"""Small models of every architecture and activation, with random parameters (biases and skip included).

A test that takes `architecture` or `activation` runs for each of them, unless it names its own.

Axes: B tokens · Xi/Xo input/output crosscoding dims · Di/Do widths · L latents.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from crosscode.models import (
    ACTIVATIONS,
    BaseCrosscoder,
    CompoundCrossLayerTranscoder,
    CrossLayerTranscoder,
    ModelHookpointAcausalCrosscoder,
    SAEOrTranscoder,
)
from crosscode.models import ARCHITECTURES as REGISTRY
from crosscode.models.architecture import split_for

N_LATENTS = 24

ARCHITECTURES: dict[str, Callable[..., BaseCrosscoder]] = {
    "sae": lambda *a, **o: SAEOrTranscoder(5, 5, *a, **o),
    "sae_pre_bias": lambda *a, **o: SAEOrTranscoder(5, 5, *a, use_pre_bias=True, **o),
    "sae_without_biases": lambda *a, **o: SAEOrTranscoder(
        5, 5, *a, use_encoder_bias=False, use_decoder_bias=False, **o
    ),
    "skip_transcoder": lambda *a, **o: SAEOrTranscoder(5, 7, *a, linear_skip=True, **o),
    "acausal_2x1": lambda *a, **o: ModelHookpointAcausalCrosscoder(2, 1, 5, *a, **o),
    "acausal_shared": lambda *a, **o: ModelHookpointAcausalCrosscoder(2, 1, 5, *a, n_shared_latents=6, **o),
    "acausal_partition": lambda *a, **o: ModelHookpointAcausalCrosscoder(
        2,
        1,
        5,
        *a,
        n_shared_latents=4,
        partition=[{"models": [0], "n_latents": 6}, {"models": [1], "n_latents": 5}],
        **o,
    ),
    "acausal_3x2_partition": lambda *a, **o: ModelHookpointAcausalCrosscoder(
        3, 2, 4, *a, partition=[{"models": [0, 2], "n_latents": 8}, {"models": [1], "n_latents": 6}], **o
    ),
    "acausal_3x2": lambda *a, **o: ModelHookpointAcausalCrosscoder(3, 2, 4, *a, **o),
    "cross_layer": lambda *a, **o: CrossLayerTranscoder(3, 5, 4, *a, **o),
    "cross_layer_skip": lambda *a, **o: CrossLayerTranscoder(3, 5, 4, *a, linear_skip=True, **o),
    "compound": lambda *a, **o: CompoundCrossLayerTranscoder(3, 5, 4, *a, **o),
    "compound_skip_later_only": lambda *a, **o: CompoundCrossLayerTranscoder(
        3, 5, 4, *a, own_layer=False, linear_skip=True, **o
    ),
    "transcoder_set": lambda *a, **o: CompoundCrossLayerTranscoder(
        3, 5, 4, *a, later_layers=False, linear_skip=True, **o
    ),
}


def of_registry(known: set[type[BaseCrosscoder]]) -> dict[str, Callable[..., BaseCrosscoder]]:
    """Architectures that are registered and not `known`, each at the first numbers of models and hookpoints that it reads."""
    made: dict[str, Callable[..., BaseCrosscoder]] = {}
    for name in REGISTRY:
        made_by, split = REGISTRY[name], split_for(name)
        n_models, n_hookpoints = next(dims for dims in product((1, 2), (1, 2, 3, 4)) if split.reads(*dims))
        if made_by not in known:
            made[name] = partial(made_by, *made_by.dims_for(n_models, n_hookpoints, 5).values())
    return made


ARCHITECTURES |= of_registry(
    {SAEOrTranscoder, ModelHookpointAcausalCrosscoder, CrossLayerTranscoder, CompoundCrossLayerTranscoder}
)

ACTIVATION_CONFIGS: dict[str, dict[str, Any]] = {
    "relu": {"type": "relu"},
    "topk": {"type": "topk", "k": 4},
    "batch_topk": {"type": "batch_topk", "k": 4},
    "batch_topk_by_norm": {"type": "batch_topk", "k": 4, "rank_by": "decoder_norm_weighted"},
    "groupmax": {"type": "groupmax", "k": 4},
    "jumprelu": {"type": "jumprelu", "log_threshold_init": -1.5},
    "jumprelu_gdm": {"type": "jumprelu", "log_threshold_init": -1.5, "ste": "gdm"},
    "jumprelu_linear": {"type": "jumprelu", "log_threshold_init": -1.5, "thresholds": "linear"},
}


@dataclass(frozen=True)
class Case:
    """A model and a batch for it."""

    model: BaseCrosscoder
    input_BXiDi: Tensor
    target_BXoDo: Tensor


@pytest.fixture
def randomise() -> Callable[..., BaseCrosscoder]:
    return _randomise


def _randomise(model: BaseCrosscoder, seed: int = 0) -> BaseCrosscoder:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            # Thresholds stay near where they were, so that latents keep firing.
            new = param.double() + 0.2 * noise if "log_threshold" in name else 0.5 * noise
            if name.endswith(".threshold_L"):
                new = param.double() * (0.2 * noise).exp()
            param.copy_(new.to(param.dtype))
        n_shared = model.n_shared_latents
        if n_shared:
            model.W_dec_LXoDo[:n_shared, 1:] = model.W_dec_LXoDo[:n_shared, :1]
        if model.partition is not None:
            model.partition.clear_(model.W_enc_LXiDi, model.W_dec_LXoDo)
    return model


@pytest.fixture
def make_case() -> Callable[..., Case]:
    """`make_case(architecture, activation, backend=..., dtype=..., n_tokens=...)`."""

    def make(
        architecture: str,
        activation: str | dict[str, Any] = "topk",
        *,
        backend: str = "torch",
        dtype: torch.dtype = torch.float64,
        n_tokens: int = 16,
        seed: int = 0,
        **options: Any,
    ) -> Case:
        torch.set_num_threads(1)
        config = dict(ACTIVATION_CONFIGS[activation] if isinstance(activation, str) else activation)
        activation_fn = ACTIVATIONS[config.pop("type")](**config, n_latents=N_LATENTS)
        model = ARCHITECTURES[architecture](N_LATENTS, activation_fn, backend=backend, dtype=dtype, **options)
        _randomise(model, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        input_ = torch.randn((n_tokens, *model.in_dims, model.d_in), generator=generator, dtype=torch.float64)
        target = torch.randn((n_tokens, *model.out_dims, model.d_out), generator=generator, dtype=torch.float64)
        return Case(model, input_.to(dtype), target.to(dtype))

    return make


_NO_DEVICE = "needs a CUDA or ROCm device"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where they cannot run, each with the reason."""
    if not torch.cuda.is_available():
        reason = _NO_DEVICE
    elif os.environ.get("TRITON_INTERPRET") == "1":
        reason = "kernels run in the interpreter in this process"
    else:
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # not `in item.keywords`: names of folders are keywords, too
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "make_case" not in metafunc.fixturenames:
        return
    marks = metafunc.definition.iter_markers("parametrize")
    parametrised = {
        name.strip()
        for mark in marks
        for name in (mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0])
    }
    for argument, values in (("architecture", ARCHITECTURES), ("activation", ACTIVATION_CONFIGS)):
        if argument in metafunc.fixturenames and argument not in parametrised:
            metafunc.parametrize(argument, list(values))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many tests wait for a machine with a GPU."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if _NO_DEVICE in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} tests marked gpu were skipped")
