"""crosscode: train crosscoders, cross-layer transcoders and SAEs on language model activations.

Names are loaded when they are first asked for: `import crosscode` alone touches no disk, no network and no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crosscode.data.dataloader import ActivationsDataloader as ActivationsDataloader
    from crosscode.data.harvest.harvester import ActivationHarvester as ActivationHarvester
    from crosscode.data.store.reader import ActivationCache as ActivationCache
    from crosscode.data.text.tokens import TokenSequenceLoader as TokenSequenceLoader
    from crosscode.errors import InputError as InputError
    from crosscode.models import ActivationFunction as ActivationFunction
    from crosscode.models import AnthropicSTEJumpReLUActivation as AnthropicSTEJumpReLUActivation
    from crosscode.models import AnthropicTransposeInit as AnthropicTransposeInit
    from crosscode.models import AnthropicTransposeInitCrossLayerTC as AnthropicTransposeInitCrossLayerTC
    from crosscode.models import BaseCrosscoder as BaseCrosscoder
    from crosscode.models import BatchTopkActivation as BatchTopkActivation
    from crosscode.models import CompoundCrossLayerTranscoder as CompoundCrossLayerTranscoder
    from crosscode.models import CompoundUniformInit as CompoundUniformInit
    from crosscode.models import CrossLayerTranscoder as CrossLayerTranscoder
    from crosscode.models import GroupMaxActivation as GroupMaxActivation
    from crosscode.models import IdenticalLatentsInit as IdenticalLatentsInit
    from crosscode.models import InitStrategy as InitStrategy
    from crosscode.models import JanUpdateInit as JanUpdateInit
    from crosscode.models import JanUpdateNoEncoderBiasInit as JanUpdateNoEncoderBiasInit
    from crosscode.models import ModelHookpointAcausalCrosscoder as ModelHookpointAcausalCrosscoder
    from crosscode.models import OrthogonalSkipInit as OrthogonalSkipInit
    from crosscode.models import ReLUActivation as ReLUActivation
    from crosscode.models import SAEOrTranscoder as SAEOrTranscoder
    from crosscode.models import TopkActivation as TopkActivation
    from crosscode.models import ZeroDecSkipInit as ZeroDecSkipInit
    from crosscode.objectives import Objective as Objective
    from crosscode.trainers import Trainer as Trainer

_HOMES = {
    "ActivationCache": "crosscode.data.store.reader",
    "ActivationFunction": "crosscode.models",
    "ActivationHarvester": "crosscode.data.harvest.harvester",
    "ActivationsDataloader": "crosscode.data.dataloader",
    "AnthropicSTEJumpReLUActivation": "crosscode.models",
    "AnthropicTransposeInit": "crosscode.models",
    "AnthropicTransposeInitCrossLayerTC": "crosscode.models",
    "BaseCrosscoder": "crosscode.models",
    "BatchTopkActivation": "crosscode.models",
    "CompoundCrossLayerTranscoder": "crosscode.models",
    "CompoundUniformInit": "crosscode.models",
    "CrossLayerTranscoder": "crosscode.models",
    "GroupMaxActivation": "crosscode.models",
    "IdenticalLatentsInit": "crosscode.models",
    "InitStrategy": "crosscode.models",
    "InputError": "crosscode.errors",
    "JanUpdateInit": "crosscode.models",
    "JanUpdateNoEncoderBiasInit": "crosscode.models",
    "ModelHookpointAcausalCrosscoder": "crosscode.models",
    "Objective": "crosscode.objectives",
    "OrthogonalSkipInit": "crosscode.models",
    "ReLUActivation": "crosscode.models",
    "SAEOrTranscoder": "crosscode.models",
    "TokenSequenceLoader": "crosscode.data.text.tokens",
    "TopkActivation": "crosscode.models",
    "Trainer": "crosscode.trainers",
    "ZeroDecSkipInit": "crosscode.models",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("crosscode")
    if name not in _HOMES:
        raise AttributeError(f"module 'crosscode' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
