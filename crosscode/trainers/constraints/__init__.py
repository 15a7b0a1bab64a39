"""What acts on gradients and weights around the optimizer step: one file each, found by `CONSTRAINTS`."""

from crosscode.trainers.constraints.base import CONSTRAINTS as CONSTRAINTS
from crosscode.trainers.constraints.base import Constraint as Constraint
from crosscode.trainers.constraints.chosen import constrain as constrain
from crosscode.trainers.constraints.chosen import constraints_for as constraints_for
from crosscode.trainers.constraints.hold_partition import HoldPartition as HoldPartition
from crosscode.trainers.constraints.tie_shared_decoders import TieSharedDecoders as TieSharedDecoders
from crosscode.trainers.constraints.tie_targets import TieTargets as TieTargets
from crosscode.trainers.constraints.unit_norm_decoder import UnitNormDecoder as UnitNormDecoder
