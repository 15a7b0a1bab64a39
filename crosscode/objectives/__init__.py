"""Loss terms, schedules of their coefficients, and the objective that adds them up."""

from crosscode.objectives.base import TERMS as TERMS
from crosscode.objectives.base import Loss as Loss
from crosscode.objectives.base import LossContext as LossContext
from crosscode.objectives.base import LossTerm as LossTerm
from crosscode.objectives.base import Objective as Objective
from crosscode.objectives.base import objective_from as objective_from
from crosscode.objectives.schedules import Constant as Constant
from crosscode.objectives.schedules import LinearRamp as LinearRamp
from crosscode.objectives.schedules import WarmUp as WarmUp
from crosscode.objectives.schedules import as_schedule as as_schedule
from crosscode.objectives.terms import AuxKTerm as AuxKTerm
from crosscode.objectives.terms import DeltaTerm as DeltaTerm
from crosscode.objectives.terms import L0Term as L0Term
from crosscode.objectives.terms import L1Term as L1Term
from crosscode.objectives.terms import MatryoshkaTerm as MatryoshkaTerm
from crosscode.objectives.terms import MultiTopkTerm as MultiTopkTerm
from crosscode.objectives.terms import PreActTerm as PreActTerm
from crosscode.objectives.terms import ReconTerm as ReconTerm
from crosscode.objectives.terms import TanhTerm as TanhTerm
