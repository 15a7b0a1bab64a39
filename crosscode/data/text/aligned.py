"""One text, two tokenizers: the tokens of another one beside those of the first, and which positions mean the same.

A sequence of the first tokenizer's tokens shows pieces of documents. Each piece, to the character, is what the other
model reads, in tokens of its own. A position of the first has a partner where a token of the other ends at the same
character; of several tokens that end there (bytes of one character) the last. Of a chat, which two templates write in two
ways, the characters of what its messages say are counted.

H sequences · S positions of the first tokenizer · T positions of the other · E token ends in a piece.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from crosscode.config.data import TokenPolicy
from crosscode.data.text.chats import Span, message_spans
from crosscode.data.text.documents import Document
from crosscode.data.text.render import DOCUMENT_START, NO_CHARACTERS, PADDING, Frame
from crosscode.data.text.token_chunks import Tokens
from crosscode.errors import InputError

_MESSAGE_SHIFT = 32
_WITHOUT = "leave such chats out: models of different tokenizers are aligned by what messages say"


@dataclass(frozen=True)
class OtherTokens:
    """The same sequences as another tokenizer cuts them, padded on the right. `usable_HT`: no padding, no special token, no
    beginning. `place_HS`: for each position of the first one its partner among the usable ones of T, -1 where there is none."""

    tokens_HT: Tensor
    usable_HT: Tensor
    segments_HT: Tensor | None
    place_HS: Tensor

    def __getitem__(self, rows: Any) -> OtherTokens:
        segments_HT = None if self.segments_HT is None else self.segments_HT[rows]
        return OtherTokens(self.tokens_HT[rows], self.usable_HT[rows], segments_HT, self.place_HS[rows])

    def moved(self, values_HS: Tensor) -> Tensor:
        """`values_HT...` of values at the first one's positions, 0 where there is no partner."""
        h_N, s_N = (self.place_HS >= 0).nonzero(as_tuple=True)
        values_HT = values_HS.new_zeros(*self.tokens_HT.shape, *values_HS.shape[2:])
        values_HT[h_N, self.place_HS[h_N, s_N]] = values_HS[h_N, s_N]
        return values_HT

    def fetched(self, values_HT: Tensor) -> Tensor:
        """`values_HS...` at the partners, 0 where there is none."""
        place_HS = self.place_HS.to(values_HT.device)
        index_HS = place_HS.clamp(min=0).reshape(*place_HS.shape, *(1,) * (values_HT.ndim - 2))
        found_HS = values_HT.take_along_dim(index_HS, dim=1)
        return found_HS.masked_fill((place_HS < 0).reshape(index_HS.shape), 0)


@dataclass(frozen=True)
class Piece:
    """Tokens of a sequence from `first_S` on, which show characters `begin` to `end` of a document (as the first tokenizer has
    it); `ends_E`: where each of them ends, -1 for one that ends no character."""

    document: Document
    first_S: int
    ends_E: Tensor
    begin: int
    end: int
    is_first: bool
    """whether the document begins here"""
    is_last: bool
    """whether it ends here"""


def pieces_of(whole: Tokens, documents: Sequence[Mapping[int, Document]], has_own_bos: bool) -> list[list[Piece]]:
    """The pieces of documents that each of the sequences `whole` shows. `documents`: by the numbers that tokens bear;
    `has_own_bos`: sequences begin with a BOS, behind which a document is no second piece."""
    is_first_HS = (whole.flags_T & DOCUMENT_START) != 0
    n_H = ((whole.flags_T & PADDING) == 0).sum(1).tolist()
    least = 1 + has_own_bos
    found: list[list[Piece]] = []
    for h, n in enumerate(n_H):
        edges = [0, *(s for s in is_first_HS[h, :n].nonzero()[:, 0].tolist() if s >= least), n]
        found.append([])
        for first, end in itertools.pairwise(edges):
            if end - first > 1 and bool(whole.chars_T3[h, first, 2]):
                first += 1  # what ends one document is the BOS of the next
            begin, ends_E = int(whole.chars_T3[h, first, 0]), whole.chars_T3[h, first:end, 1]
            number = int(whole.document_T[h, end - 1])
            found[-1].append(
                Piece(
                    document=next(some[number] for some in documents if number in some),
                    first_S=first,
                    ends_E=ends_E,
                    begin=begin,
                    end=max(begin, int(ends_E.max())),
                    is_first=begin == 0 and bool(is_first_HS[h, first]),
                    is_last=bool(whole.chars_T3[h, end - 1, 2]),
                )
            )
    return found


def check_alignable(first: Any, others: Sequence[Any]) -> None:
    """Raise `InputError` where there are other tokenizers, and one of all does not know where its tokens end."""
    for tokenizer in (first, *others) if others else ():
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                f"language_models: models of different tokenizers are aligned by characters, which a "
                f"{type(tokenizer).__name__} does not tell of its tokens; a tokenizer of the tokenizers library is needed"
            )


@dataclass
class Aligner:
    """Makes `OtherTokens` of the pieces of sequences.

    Raises:
        InputError: a tokenizer that does not know which characters its tokens stand for, documents of token ids.
    """

    first: Any
    other: Any
    policy: TokenPolicy
    max_length: int | None = None
    """positions that the other model takes; what is beyond has no partner"""
    _known: dict[int, tuple[str, str, list[tuple[Span, Span]]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_alignable(self.first, [self.other])
        special = set(self.other.all_special_ids) if self.policy.mask_special_tokens else set()
        self._masked = torch.tensor(sorted(special), dtype=torch.long)
        self._frame = Frame.of(self.other, self.policy)

    def __call__(self, rows: Sequence[Sequence[Piece]], length: int) -> OtherTokens:
        """`rows`: the pieces of each sequence of `length` positions."""
        self._known.clear()
        place_HS = torch.full((len(rows), length), -1)
        made = [self._row(pieces, place_HS[h]) for h, pieces in enumerate(rows)]
        longest = max((len(ids) for ids, _ in made), default=0) or 1
        tokens_HT = torch.full((len(rows), longest), self._frame.pad_id)
        segments_HT = torch.zeros((len(rows), longest), dtype=torch.long)
        usable_HT = torch.zeros((len(rows), longest), dtype=torch.bool)
        for h, (ids, segments) in enumerate(made):
            tokens_HT[h, : len(ids)] = torch.tensor(ids, dtype=torch.long)
            segments_HT[h, : len(ids)] = torch.tensor(segments, dtype=torch.long)
            segments_HT[h, len(ids) :] = segments[-1] if segments else 0
            usable_HT[h, : len(ids)] = True
        usable_HT &= ~torch.isin(tokens_HT, self._masked)
        if not self.policy.keeps_first():
            usable_HT[:, :1] = False
            if self.policy.isolate_documents:
                usable_HT[:, 1:] &= segments_HT[:, 1:] == segments_HT[:, :-1]
        place_HS[(place_HS >= 0) & ~usable_HT.gather(1, place_HS.clamp(min=0))] = -1
        return OtherTokens(tokens_HT, usable_HT, segments_HT if self.policy.isolate_documents else None, place_HS)

    def _row(self, pieces: Sequence[Piece], place_S: Tensor) -> tuple[list[int], list[int]]:
        """The other's token ids, and the number of the piece that each belongs to."""
        ids: list[int] = []
        segments: list[int] = []
        for number, piece in enumerate(pieces):
            text, of_other, spans = self._texts(piece.document)
            # Where a document begins and ends, so does the other's, whatever the template says there first. The first tokenizer
            # may have no token for how it ends: white space, an accent.
            begin = 0 if piece.is_first else _across(piece.begin, len(text), len(of_other), spans)
            end = len(of_other) if piece.is_last else _across(piece.end, len(text), len(of_other), spans)
            encoded = self.other(
                of_other[begin:end], add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            own, ends_U = (
                list(encoded["input_ids"]),
                torch.tensor([stop for _, stop in encoded["offset_mapping"]]) + begin,
            )
            bos_id = self._frame.row_bos_id if number == 0 else None
            bos_id = self._frame.bos_id if bos_id is None and piece.is_first else bos_id
            if bos_id is not None and own[:1] != [bos_id]:
                own, ends_U = [bos_id, *own], torch.cat([torch.tensor([NO_CHARACTERS]), ends_U])
            if piece.is_last and self._frame.separator_id is not None and own[-1:] != [self._frame.separator_id]:
                own.append(self._frame.separator_id)
            in_first = _keys(piece.ends_E, [span for span, _ in spans], piece.begin)
            in_other = _keys(ends_U, [span for _, span in spans], begin)
            for key, s in in_first.items():
                if (at := in_other.get(key)) is not None and self._fits(len(ids) + at):
                    place_S[piece.first_S + s] = len(ids) + at
            ids += own
            segments += [number] * len(own)
        return ids[: self.max_length], segments[: self.max_length]

    def _fits(self, place: int) -> bool:
        return self.max_length is None or place < self.max_length

    def _texts(self, document: Document) -> tuple[str, str, list[tuple[Span, Span]]]:
        """A document as either tokenizer has it, and what in the one stands at what place of the other."""
        known = self._known.get(id(document))
        if known is None:
            known = self._known[id(document)] = self._compared(document)
        return known

    def _compared(self, document: Document) -> tuple[str, str, list[tuple[Span, Span]]]:
        if isinstance(document, str):
            whole = (0, len(document))
            return document, document, [(whole, whole)]
        if not len(document) or not isinstance(document[0], Mapping):
            raise InputError(
                "dataset: it holds token ids, which language_models of different tokenizers cannot both read; give text"
            )
        messages: Any = document
        (text, found, _), (of_other, found_other, _) = (
            message_spans(each, messages, would_help=_WITHOUT) for each in (self.first, self.other)
        )
        pairs, others, at = [], _said(of_other, found_other), 0
        for span, what in _said(text, found):
            # What one template leaves out, or says elsewhere, has no partner.
            same = next((k for k in range(at, len(others)) if others[k][1] == what), None)
            if same is not None:
                pairs.append((span, others[same][0]))
                at = same + 1
        return text, of_other, pairs


def _said(text: str, found: Sequence[tuple[Span, int]]) -> list[tuple[Span, tuple[int, str]]]:
    """Without white space around: where each content is, and what it says, with its message's number; nothing where that is
    white space alone."""
    said = []
    for (begin, end), i in found:
        words = text[begin:end].strip()
        if words:
            begin += len(text[begin:end]) - len(text[begin:end].lstrip())
            said.append(((begin, begin + len(words)), (i, words)))
    return said


def _across(edge: int, length: int, length_other: int, spans: Sequence[tuple[Span, Span]]) -> int:
    """A place between characters, in the other text; within a template's words, behind what was said before."""
    if edge >= length:
        return length_other
    found = 0
    for (begin, end), (begin_other, end_other) in spans:
        if edge < begin:
            return found
        found = begin_other + edge - begin if edge < end else end_other
        if edge < end:
            return found
    return found


def _keys(ends_E: Tensor, spans: Sequence[Span], begin: int) -> dict[int, int]:
    """For each character at which a token ends, counted within what is said, the last such token."""
    found: dict[int, int] = {}
    number = 0
    for place, end in enumerate(ends_E.tolist()):
        while number < len(spans) and end > spans[number][1]:
            number += 1
        if number < len(spans) and max(spans[number][0], begin) < end:
            found[number << _MESSAGE_SHIFT | end - spans[number][0]] = place
    return found
