"""A scheme of a comparison: its model, objective, initialisation and training.

Axes: M models · P hookpoints · D width.
"""

from __future__ import annotations

import math

from crosscode_kernels import BackendName

from crosscode.config.experiment import TrainConfig
from crosscode.config.registry import Component
from crosscode.errors import InputError
from crosscode.models import ACTIVATIONS, INITIALIZATIONS, ModelHookpointAcausalCrosscoder
from crosscode.models.initialization import InitStrategy
from crosscode.objectives import Objective, objective_from
from crosscode.synthetic.config import SyntheticConfig
from crosscode.synthetic.schemes import SCHEMES, Wanted


class SyntheticScheme:
    """A scheme, made for what is wanted of it.

    Coefficients are tuned by hand to about 8 active latents on the default dictionary.
    """

    def __init__(
        self,
        name: str,
        wanted: Wanted,
        lr: float | None = None,
        dec_init_norm: float | None = None,
        encoder_scale: float | None = None,
        own_scale: float = 1.0,
    ):
        if name not in SCHEMES:
            raise InputError(f"schemes: unknown scheme {name!r}; available: {', '.join(SCHEMES)}")
        self.name, self.n_latents, self.penalty = name, wanted.n_latents, wanted.penalty
        parts = SCHEMES[name](wanted)
        self.is_penalised = bool(parts["objective"].keys() & {"l1", "tanh"})
        self.parts = parts
        if lr is not None:
            parts["optimizer"] = parts["optimizer"] | {"lr": lr}
        start = {
            "anthropic_transpose": {"dec_init_norm": dec_init_norm},
            "jan_update": {"encoder_scale": encoder_scale},
        }[parts["init"]["type"]]
        parts["init"] = parts["init"] | {name: value for name, value in start.items() if value is not None}
        if "n_shared_latents" in parts["crosscoder"]:
            parts["init"] = {"type": "identical_latents", "first": parts["init"], "own_scale": own_scale}

    @classmethod
    def of(cls, config: SyntheticConfig, name: str, penalty: float | None = None) -> SyntheticScheme:
        """A scheme as a config asks for it; `penalty` in place of the config's."""
        k = config.wanted_l0()
        n_latents = config.n_latents or k * math.ceil(1.25 * config.planted.n_features / k)
        penalty = config.penalty if penalty is None else penalty
        n_shared = round(config.shared_fraction * n_latents)
        wanted = Wanted(k, n_latents, penalty, n_shared, config.planted.n_models)
        return cls(name, wanted, config.lr, config.dec_init_norm, config.encoder_scale, config.own_scale)

    def model(self, dims: tuple[int, int, int], backend: BackendName) -> ModelHookpointAcausalCrosscoder:
        """An uninitialised crosscoder over `(M, P, D)`."""
        activation = ACTIVATIONS.build(self.parts["activation"], n_latents=self.n_latents)
        return ModelHookpointAcausalCrosscoder(
            *dims, self.n_latents, activation, **self.parts["crosscoder"], backend=backend
        )

    def objective(self) -> Objective:
        terms = {"recon": {}, **self.parts["objective"]}
        return objective_from({name: Component(type=name, **fields) for name, fields in terms.items()})

    def init(self) -> InitStrategy:
        return INITIALIZATIONS.build(self.parts["init"])

    def train_config(self, config: SyntheticConfig) -> TrainConfig:
        return TrainConfig(
            n_tokens=config.n_steps * config.batch_size,
            batch_size=config.batch_size,
            resample=config.resample,
            optimizer=Component(**self.parts["optimizer"]),
            log_every=max(1, config.n_steps // 5),
        )
