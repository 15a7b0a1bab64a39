"""The public names, each once: type checkers read them here, and so does `crosscode/__init__.py`."""

# From tensors or a config to a run
from crosscode_kernels import Backend as Backend
from crosscode_kernels.sparse import DenseLatents as DenseLatents
from crosscode_kernels.sparse import SparseLatents as SparseLatents

from crosscode.analysis.verdict import Verdict as Verdict
from crosscode.api.opening import open as open
from crosscode.api.run import Run as Run
from crosscode.api.training import train as train
from crosscode.commands.parts.reading import LatentLogits as LatentLogits
from crosscode.commands.parts.reading import ShownExample as ShownExample
from crosscode.commands.parts.reading import TextLatents as TextLatents
from crosscode.commands.parts.steering import Steered as Steered

# The loop
from crosscode.config.experiment import TrainConfig as TrainConfig
from crosscode.config.registry import ConfigModel as ConfigModel

# Activations
from crosscode.data.dataloader import ActivationsDataloader as ActivationsDataloader
from crosscode.data.harvest.harvester import ActivationHarvester as ActivationHarvester
from crosscode.data.harvest.language_models import LanguageModel as LanguageModel
from crosscode.data.harvest.language_models import wrap_language_model as wrap_language_model
from crosscode.data.harvest.loading import load_language_model as load_language_model
from crosscode.data.rows import Rows as Rows
from crosscode.data.rows import RowSource as RowSource
from crosscode.data.scaling import estimate_scaling as estimate_scaling
from crosscode.data.store.reader import ActivationCache as ActivationCache
from crosscode.data.store.rows import StoredRows as StoredRows
from crosscode.data.store.writer import ActivationCacheWriter as ActivationCacheWriter
from crosscode.data.text.sources import load_documents as load_documents
from crosscode.data.text.sources import wrap_documents as wrap_documents
from crosscode.data.text.tokens import TokenSequenceLoader as TokenSequenceLoader

# What goes wrong
from crosscode.errors import CrosscodeError as CrosscodeError
from crosscode.errors import InputError as InputError
from crosscode.errors import Interrupted as Interrupted
from crosscode.evaluation.difference_lens import MeanDifference as MeanDifference
from crosscode.evaluation.difference_lens import mean_differences as mean_differences
from crosscode.evaluation.heldout import EvaluationResult as EvaluationResult
from crosscode.evaluation.heldout import measure_reconstruction as measure_reconstruction

# Other libraries
from crosscode.interop.saebench import SAEBenchCoder as SAEBenchCoder

# Models
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
from crosscode.models.activations import ACTIVATIONS as ACTIVATIONS
from crosscode.models.architecture import ARCHITECTURES as ARCHITECTURES
from crosscode.models.architecture import split_for as split_for
from crosscode.models.forward import ForwardResult as ForwardResult
from crosscode.models.initialization import INITIALIZATIONS as INITIALIZATIONS
from crosscode.models.split import Split as Split
from crosscode.objectives import TERMS as TERMS

# Objectives
from crosscode.objectives import AuxKTerm as AuxKTerm
from crosscode.objectives import Constant as Constant
from crosscode.objectives import DeltaTerm as DeltaTerm
from crosscode.objectives import L0Term as L0Term
from crosscode.objectives import L1Term as L1Term
from crosscode.objectives import LinearRamp as LinearRamp
from crosscode.objectives import Loss as Loss
from crosscode.objectives import LossContext as LossContext
from crosscode.objectives import LossTerm as LossTerm
from crosscode.objectives import MatryoshkaTerm as MatryoshkaTerm
from crosscode.objectives import MultiTopkTerm as MultiTopkTerm
from crosscode.objectives import Objective as Objective
from crosscode.objectives import PreActTerm as PreActTerm
from crosscode.objectives import ReconTerm as ReconTerm
from crosscode.objectives import TanhTerm as TanhTerm
from crosscode.objectives import WarmUp as WarmUp
from crosscode.runs.directory import RunDirectory as RunDirectory
from crosscode.runs.loggers import JsonlLogger as JsonlLogger
from crosscode.runs.loggers import Logger as Logger
from crosscode.runs.loggers_extra import TensorboardLogger as TensorboardLogger
from crosscode.runs.loggers_extra import WandbLogger as WandbLogger
from crosscode.trainers import Trainer as Trainer
from crosscode.trainers.callbacks import Callback as Callback
from crosscode.trainers.constraints import CONSTRAINTS as CONSTRAINTS
from crosscode.trainers.constraints import Constraint as Constraint
from crosscode.trainers.constraints import HoldPartition as HoldPartition
from crosscode.trainers.constraints import TieSharedDecoders as TieSharedDecoders
from crosscode.trainers.constraints import UnitNormDecoder as UnitNormDecoder
from crosscode.trainers.firing import FiringTracker as FiringTracker
from crosscode.trainers.optimizers import OPTIMIZERS as OPTIMIZERS
from crosscode.trainers.optimizers import Adam as Adam
from crosscode.trainers.optimizers import OptimizerPlan as OptimizerPlan
from crosscode.trainers.optimizers.sign_sgd_schedule_free import SignSGDScheduleFree as SignSGDScheduleFree
from crosscode.trainers.source import ActivationSource as ActivationSource

__version__: str
__all__: list[str]
