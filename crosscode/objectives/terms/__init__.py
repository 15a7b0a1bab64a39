"""Loss terms: one file each, found by `TERMS`. A term of your own needs no line here."""

from crosscode.objectives.terms.auxk import AuxKTerm as AuxKTerm
from crosscode.objectives.terms.delta import DeltaTerm as DeltaTerm
from crosscode.objectives.terms.l0 import L0Term as L0Term
from crosscode.objectives.terms.l1 import L1Term as L1Term
from crosscode.objectives.terms.matryoshka import MatryoshkaTerm as MatryoshkaTerm
from crosscode.objectives.terms.multi_topk import MultiTopkTerm as MultiTopkTerm
from crosscode.objectives.terms.pre_act import PreActTerm as PreActTerm
from crosscode.objectives.terms.recon import ReconTerm as ReconTerm
from crosscode.objectives.terms.tanh import TanhTerm as TanhTerm
