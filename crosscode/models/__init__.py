"""Sparse coders: one base, subclasses that name dimensions, activations, initialisations, checkpoints."""

from crosscode.models.activations import ACTIVATIONS as ACTIVATIONS
from crosscode.models.activations import ActivationFunction as ActivationFunction
from crosscode.models.activations import AnthropicSTEJumpReLUActivation as AnthropicSTEJumpReLUActivation
from crosscode.models.activations import BatchTopkActivation as BatchTopkActivation
from crosscode.models.activations import GroupMaxActivation as GroupMaxActivation
from crosscode.models.activations import ReLUActivation as ReLUActivation
from crosscode.models.activations import TopkActivation as TopkActivation
from crosscode.models.architecture import ARCHITECTURES as ARCHITECTURES
from crosscode.models.base import BaseCrosscoder as BaseCrosscoder
from crosscode.models.base import ForwardResult as ForwardResult
from crosscode.models.compound_cross_layer_transcoder import (
    CompoundCrossLayerTranscoder as CompoundCrossLayerTranscoder,
)
from crosscode.models.cross_layer_transcoder import CrossLayerTranscoder as CrossLayerTranscoder
from crosscode.models.initialization import INITIALIZATIONS as INITIALIZATIONS
from crosscode.models.initialization import AnthropicTransposeInit as AnthropicTransposeInit
from crosscode.models.initialization import AnthropicTransposeInitCrossLayerTC as AnthropicTransposeInitCrossLayerTC
from crosscode.models.initialization import CompoundUniformInit as CompoundUniformInit
from crosscode.models.initialization import IdenticalLatentsInit as IdenticalLatentsInit
from crosscode.models.initialization import InitStrategy as InitStrategy
from crosscode.models.initialization import JanUpdateInit as JanUpdateInit
from crosscode.models.initialization import JanUpdateNoEncoderBiasInit as JanUpdateNoEncoderBiasInit
from crosscode.models.initialization import OrthogonalSkipInit as OrthogonalSkipInit
from crosscode.models.initialization import SampleBatches as SampleBatches
from crosscode.models.initialization import ZeroDecSkipInit as ZeroDecSkipInit
from crosscode.models.model_hookpoint_acausal import (
    ModelHookpointAcausalCrosscoder as ModelHookpointAcausalCrosscoder,
)
from crosscode.models.sae_or_transcoder import SAEOrTranscoder as SAEOrTranscoder
