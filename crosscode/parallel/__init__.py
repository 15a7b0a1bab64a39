"""Several processes train one model: its encoder and decoder rows are spread over them (docs/scale.md)."""

from crosscode.parallel.group import Group as Group
from crosscode.parallel.group import joined as joined
