"""Optimizers: one file each, found by `OPTIMIZERS`."""

from crosscode.trainers.optimizers.adam import Adam as Adam
from crosscode.trainers.optimizers.base import OPTIMIZERS as OPTIMIZERS
from crosscode.trainers.optimizers.base import OptimizerPlan as OptimizerPlan
