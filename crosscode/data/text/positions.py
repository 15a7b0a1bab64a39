"""Which positions of a chat are used: by role, around the beginning of turns, in or out of thinking.

Places are characters of the rendered chat, [begin, end).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crosscode.config.positions import PositionRules
from crosscode.data.text.chats import Span, marked_by_template
from crosscode.data.text.labels import TEMPLATE, role_number

_THINKING = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Said:
    """Where each message (by number) is said in the text, thinking included, where the assistant thinks, and the messages of
    which that is not known whole."""

    said: Sequence[tuple[Span, int]]
    thinking: Sequence[tuple[Span, int]]
    unsure: frozenset[int]


def said_by(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    text: str,
    found: Sequence[tuple[Span, int]],
    changed: frozenset[int],
) -> Said:
    """`found`: where in `text` each message is said, `changed`: where that is not known, as `message_spans` has them; of the
    assistant's, what the template marks as its counts, where it does."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    marked = marked_by_template(tokenizer, messages, text)
    if marked is not None:
        found = [(span, i) for span, i in found if i not in answers] + list(zip(marked, answers, strict=True))
        changed -= set(answers)
    thinking = _thinking(text, found, answers)
    return Said(sorted([*found, *thinking]), thinking, changed)


def roles_of(messages: Sequence[Mapping[str, Any]], said: Said, text: str, offsets: Sequence[Span]) -> list[int]:
    """The number of each token's role: that of its first character that a message says."""
    role_of = bytearray([TEMPLATE]) * len(text)
    for (begin, end), i in said.said:
        role_of[begin:end] = bytes([role_number(messages[i]["role"])]) * (end - begin)
    return [next((role for role in role_of[begin:end] if role != TEMPLATE), TEMPLATE) for begin, end in offsets]


def chosen_positions(
    rules: PositionRules, messages: Sequence[Mapping[str, Any]], of_text: Said, offsets: Sequence[Span]
) -> list[bool]:
    """Of each token whether all rules leave it, but for the number a document. `offsets`: where in the text each token is."""
    said, thinking = of_text.said, of_text.thinking
    chosen = [True] * len(offsets)
    if rules.thinking != "keep":
        inside = in_spans(offsets, [span for span, _ in thinking])
        chosen = [one == (rules.thinking == "only") for one in inside]
    wanted = [(span, i) for span, i in said if rules.roles is None or messages[i]["role"] in rules.roles]
    if rules.around_turn is not None:
        near = _windows(rules.around_turn, wanted, said, offsets)
    elif rules.roles is not None:
        near = in_spans(offsets, [span for span, _ in wanted])
    else:
        return chosen
    return [one and other for one, other in zip(chosen, near, strict=True)]


def with_white_space(offsets: Sequence[Span]) -> list[Span]:
    """Where a tokenizer trims places, a token of white space alone has none, only an end: it is given what lies behind the
    tokens before it."""
    ended = [0, *itertools.accumulate((end for _, end in offsets), max)]
    return [
        (min(begin, before) if begin == end else begin, end)
        for (begin, end), before in zip(offsets, ended[:-1], strict=True)
    ]


def in_spans(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Of each token whether it has a character in one of the places."""
    return [any(begin < last and first < end for begin, end in spans) for first, last in offsets]


def _thinking(text: str, found: Sequence[tuple[Span, int]], answers: Sequence[int]) -> list[tuple[Span, int]]:
    """Where the assistant thinks: within what it says, or where the template writes it, before that and after the message
    before."""
    places, at = [], 0
    while match := _THINKING.search(text, at):
        at = match.start() + 1
        after = [(span, i) for span, i in sorted(found) if span[1] > match.start()]
        if after and (i := after[0][1]) in answers:
            own = itertools.takewhile(lambda one, i=i: one[1] == i, after)
            at = min(match.end(), max(end for (_, end), _ in own))
            places.append(((match.start(), at), i))
    return places


def _windows(
    window: tuple[int, int],
    wanted: Sequence[tuple[Span, int]],
    said: Sequence[tuple[Span, int]],
    offsets: Sequence[Span],
) -> list[bool]:
    chosen = [False] * len(offsets)
    for i in dict.fromkeys(i for _, i in wanted):
        begin = min(span[0] for span, of in wanted if of == i)
        end = max(span[1] for span, of in wanted if of == i)
        before = max((span[1] for span, of in said if of != i and span[1] <= begin), default=0)
        first = next((t for t, (_, last) in enumerate(offsets) if last > begin), None)
        if first is None:
            continue
        for t in range(max(0, first + window[0]), min(len(offsets), first + window[1] + 1)):
            chosen[t] |= offsets[t][0] >= before and offsets[t][0] < end
    return chosen
