"""The training loop and what it is composed of."""

from crosscode.evaluation.evaluation import EvaluationResult as EvaluationResult
from crosscode.evaluation.evaluation import evaluate as evaluate
from crosscode.evaluation.fvu import FvuAccumulator as FvuAccumulator
from crosscode.runs.directory import RunDirectory as RunDirectory
from crosscode.trainers.settings import TrainerSettings as TrainerSettings
from crosscode.trainers.trainer import Trainer as Trainer
