"""What a user can set of a comparison on planted dictionaries, with meanings and defaults. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from crosscode.config.experiment import ResampleConfig
from crosscode.config.registry import ConfigModel
from crosscode.synthetic.schemes import SCHEMES


class PlantedConfig(ConfigModel):
    """A planted dictionary, and how its features fire."""

    n_features: PositiveInt = 256
    """planted features F"""
    n_exclusive: NonNegativeInt = 64
    """of these, features of one model alone, dealt out to the models in turn"""
    n_models: PositiveInt = 2
    """models M"""
    n_hookpoints: PositiveInt = 1
    """hookpoints P"""
    d_model: PositiveInt = 64
    """width D of each (model, hookpoint)"""
    shared_directions: Literal["same", "independent"] = "same"
    """whether a shared feature has one direction in all models, or one of its own in each"""
    mean_active: PositiveFloat = 8.0
    """features that fire on a token, on average"""
    zipf_exponent: NonNegativeFloat = 0.6
    """firing rates fall with rank to this power; 0: all alike"""
    correlation: float = Field(default=0.0, ge=0, lt=1)
    """correlation of the hidden variables of features in one group: above 0 they fire together"""
    group_size: PositiveInt = 8
    """features of one correlated group"""
    noise: NonNegativeFloat = 0.02
    """standard deviation of the noise in each coordinate; a feature's mean length is 1"""
    seed: NonNegativeInt = 0
    """seed of dictionary and activations"""


class SyntheticConfig(ConfigModel):
    """What to plant, which schemes to train on it, and for how long."""

    planted: PlantedConfig = PlantedConfig()
    """the planted dictionary"""
    schemes: list[str] = Field(default=list(SCHEMES), min_length=1)
    """schemes to train, by name"""
    l0: PositiveInt | None = None
    """wanted L0: the k of TopK styles, the aim of max_runs for the others; null: planted.mean_active, rounded"""
    n_latents: PositiveInt | None = None
    """latents of each crosscoder; null: 5/4 of the planted features, rounded up to a multiple of the wanted L0"""
    penalty: PositiveFloat = 1.0
    """factor on the sparsity penalties of the L1 and JumpReLU schemes"""
    max_runs: PositiveInt = 1
    """how often an L1 or JumpReLU scheme may be trained to find the penalty that gives the wanted L0 (within 5 %)"""
    shared_fraction: float = Field(default=0.75, ge=0, le=1)
    """share of latents of both models: those that the February schemes tie, and that the dedicated one gives to none alone"""
    n_steps: PositiveInt = 1200
    """training steps of each run"""
    batch_size: PositiveInt = 512
    """activations of a step"""
    lr: PositiveFloat | None = None
    """learning rate of every scheme; null: each one's own, tuned for some hundred latents"""
    dec_init_norm: PositiveFloat | None = None
    """norm of decoder vectors at the start, of the schemes that begin with `anthropic_transpose`; null: 0.1"""
    encoder_scale: PositiveFloat | None = None
    """encoder over decoder at the start, of the schemes that begin with `jan_update`; null: inputs over latents"""
    own_scale: PositiveFloat = 1.0
    """decoder norm of the February schemes' other latents at the start, over that of the tied ones"""
    resample: ResampleConfig | None = None
    """give dead latents new weights, as `train.resample` does; null: never"""
    n_heldout_tokens: PositiveInt = 16_384
    """activations for FVU and L0"""
    exclusive_threshold: PositiveFloat = Field(default=0.9, lt=1)
    """relative decoder norm above which a latent is called exclusive to a model"""
    seed: NonNegativeInt = 0
    """seed of initialisation and activations (planted.seed is that of the dictionary)"""
    backend: Literal["auto", "triton", "torch", "reference"] = "auto"
    """kernels"""
    device: str = "auto"
    """device of the crosscoders: auto, cpu, cuda, cuda:1, mps"""

    def wanted_l0(self) -> int:
        return self.l0 or max(1, round(self.planted.mean_active))
