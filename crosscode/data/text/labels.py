"""What is known of a position beside its token: which text it comes from, who says it, in which document.

T positions of any shape · R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

ROLES = ("text", "template", "system", "developer", "user", "assistant", "tool", "other", "unknown")
"""By their numbers, which stand in stores: never changed, only added to. `text`: of plain text and token ids; `template`: what
a chat template adds; `other`: of a message with another role; `unknown`: of a chat in which that cannot be told."""
TEXT, TEMPLATE, UNKNOWN = (ROLES.index(name) for name in ("text", "template", "unknown"))


def role_number(role: str) -> int:
    return ROLES.index(role) if role in ROLES[2:-2] else ROLES.index("other")


@dataclass(frozen=True)
class Labels:
    """Of each position the number of its role in `ROLES` (uint8), that of its text among the parts of a mixture (int16), and
    63 bits that the content of its document decides (int64); three tensors of one shape."""

    role_T: torch.Tensor
    source_T: torch.Tensor
    document_T: torch.Tensor

    def __getitem__(self, places: Any) -> Labels:
        return Labels(self.role_T[places], self.source_T[places], self.document_T[places])

    def groups_T2(self) -> torch.Tensor:
        """Numbers of the text and of the role (int64): the ways in which figures are split."""
        return torch.stack([self.source_T.long(), self.role_T.long()], dim=-1)

    @classmethod
    def cat(cls, parts: Sequence[Labels]) -> Labels:
        whole = (torch.cat([getattr(part, name) for part in parts]) for name in ("role_T", "source_T", "document_T"))
        return cls(*whole)

    def packed_R3(self) -> torch.Tensor:
        """int32, as stores hold them."""
        own_R = (self.source_T.int() << 8) + self.role_T
        return torch.cat([own_R[:, None], self.document_T.contiguous().view(torch.int32).view(-1, 2)], dim=1)

    @classmethod
    def unpacked(cls, packed_R3: torch.Tensor) -> Labels:
        own_R = packed_R3[:, 0]
        document_R = packed_R3[:, 1:].clone(memory_format=torch.contiguous_format).view(torch.int64)[:, 0]
        return cls((own_R & 0xFF).to(torch.uint8), (own_R >> 8).to(torch.int16), document_R)
