"""The training loop and what it is composed of."""

from crosscode.evaluation.fvu import FvuAccumulator as FvuAccumulator
from crosscode.evaluation.heldout import EvaluationResult as EvaluationResult
from crosscode.runs.directory import RunDirectory as RunDirectory
from crosscode.trainers.trainer import Trainer as Trainer
