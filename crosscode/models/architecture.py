"""What an architecture is, to a config: its fields, its title, how it reads activations, the class that it makes."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import ConfigDict

from crosscode.config.experiment import CrosscoderConfig
from crosscode.config.registry import Registry
from crosscode.models.split import Split

_NO_OPTIONS = {"type", "n_latents", "expansion_factor", "activation", "init"}


class ArchitectureConfig(CrosscoderConfig):
    """Base of the `Config` of an architecture, nested in its class. Its own fields are options of the constructor."""

    model_config = ConfigDict(extra="forbid")
    title: ClassVar[str]
    """name in reports"""
    without_verdict: ClassVar[str] = ""
    """why its latents of two models have none, for reports"""
    split: ClassVar[Split]
    usual_init: ClassVar[str] = "anthropic_transpose"
    """the initialisation where none is given"""
    takes_init_of_activation: ClassVar[bool] = True
    """whether `ActivationFunction.usual_init` comes first"""

    def options(self, n_latents: int) -> dict[str, Any]:
        """Options of the model's constructor."""
        return {name: getattr(self, name) for name in type(self).model_fields.keys() - _NO_OPTIONS}


class PreBiasConfig(ArchitectureConfig):
    """For architectures whose output space is their input space."""

    use_pre_bias: bool = False
    """whether the decoder bias is subtracted from the input before encoding (Gao et al. 2024)"""


ARCHITECTURES: Registry[Any] = Registry("crosscoder", __package__ or "")
"""Subclasses of `BaseCrosscoder` by the type that configs name."""


def split_for(architecture: str) -> Split:
    """How the architecture of this type reads activations."""
    return ARCHITECTURES.config_class(architecture).split


def class_of_kind(kind: str) -> Any:
    """The model class whose files say `kind`; None: there is none."""
    return next((ARCHITECTURES[name] for name in ARCHITECTURES if ARCHITECTURES[name].kind == kind), None)
