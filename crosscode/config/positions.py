"""What a user can set about which positions of a document are used. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from crosscode.config.registry import ConfigModel


class PositionRules(ConfigModel):
    """Which positions of chats, and how many of a document, may reach training and figures; all must hold."""

    roles: Annotated[list[str], Field(min_length=1)] | None = None
    """only what messages of these roles say, and no plain text; of the assistant, what the chat template marks as its
    (generation blocks), where it does"""
    around_turn: tuple[int, int] | None = None
    """only from so many tokens before (below 0) to so many after the first token of what a message says, of `roles` where
    given: [-3, 5]. A window ends where the message does, and begins after the message before"""
    thinking: Literal["keep", "only", "drop"] = "keep"
    """what the assistant writes from <think> to </think>, tags included"""
    keep_first: bool = False
    """the first position of a sequence, too, as data.keep_first_position has it; not a BOS before it where the other rules
    choose"""
    at_most_per_document: PositiveInt | None = None
    """so many of a document's positions, evenly spread over those that the other rules and masks leave; one of them may fall on
    the first position of a sequence that documents share, and be left out"""

    @model_validator(mode="after")
    def _in_order(self) -> PositionRules:
        if self.around_turn is not None and self.around_turn[0] > self.around_turn[1]:
            raise ValueError(f"around_turn = {list(self.around_turn)}: must be [first, last] with first <= last")
        return self

    @property
    def of_chats(self) -> bool:
        """Whether plain text holds no such position."""
        return self.roles is not None or self.around_turn is not None or self.thinking == "only"
