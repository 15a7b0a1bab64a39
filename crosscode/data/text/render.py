"""One document -> its tokens and a flag byte a token.

T the tokens of one document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from crosscode.config.data import TemplateTokens, TokenPolicy
from crosscode.config.positions import PositionRules
from crosscode.data.text.chats import chat_text, message_spans, places_unknown
from crosscode.data.text.documents import Document
from crosscode.data.text.labels import TEMPLATE, TEXT, UNKNOWN
from crosscode.data.text.positions import chosen_positions, in_spans, roles_of, said_by, with_white_space
from crosscode.errors import InputError

MASKED = 1
DOCUMENT_START = 2
PADDING = 4
NO_CHARACTERS = -1
"""Where a token ends that ends no character."""
ROLE_SHIFT = 3
"""A flag byte has the number of the token's role above these."""

Rendered = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""`(tokens_T, flags_T, chars_T3)`: of each token, int32, how many characters of its document the tokens before it end, where
it ends itself (-1: it ends no character), and whether it is its document's last; zeros where nobody asked."""


@dataclass(frozen=True)
class Frame:
    """What a policy puts around texts, in the ids of one tokenizer; None: nothing."""

    bos_id: int | None
    """before each document"""
    row_bos_id: int | None
    """before each sequence"""
    separator_id: int | None
    """behind each document"""
    pad_id: int

    @classmethod
    def of(cls, tokenizer: Any, policy: TokenPolicy) -> Frame:
        bos_id, eos_id, pad_id = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad"))
        document_bos_id = bos_id if policy.bos == "document" else None
        # Where they are one token, the next document's BOS separates.
        is_separated = policy.separator == "eos" and policy.pack and (eos_id is None or eos_id != document_bos_id)
        return cls(
            document_bos_id,
            bos_id if policy.bos == "sequence" else None,
            eos_id if is_separated else None,
            next((token for token in (pad_id, eos_id) if token is not None), 0),
        )


class DocumentRenderer:
    """Turns texts, token lists and chats into `Rendered`, one for each document, without tokens for one that has none.

    `bos_id` starts every document that does not start with it already, `separator_id` ends every one that does not
    end with it already (None: neither). `row_bos_id` starts every sequence that is cut from them, in the same way.
    Where one token is BOS and separator, a document's own BOS goes: what stands before the document is one.
    `template_tokens="mask"` masks what a chat template adds around the messages, "answers" all that the assistant does not
    say, plain text included; `masked_ids` are masked wherever they stand. `positions` chooses among what is left; `leaves_first`
    and `isolates` say that the first position of a sequence, or of a document, will not be. `with_chars`: say which characters
    tokens stand for.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        bos_id: int | None,
        row_bos_id: int | None,
        separator_id: int | None,
        template_tokens: TemplateTokens,
        positions: PositionRules | None = None,
        masked_ids: Sequence[int] = (),
        leaves_first: bool = False,
        isolates: bool = False,
        with_chars: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._bos_id = bos_id
        self._row_bos_id = row_bos_id
        self._own_bos_goes = separator_id is not None and separator_id == getattr(tokenizer, "bos_token_id", None)
        self._separator_id = separator_id
        self._template_tokens = template_tokens
        self._positions = PositionRules() if positions is None else positions
        self._masked_ids = torch.tensor(masked_ids, dtype=torch.long)
        self._leaves_first, self._isolates = leaves_first, isolates
        self._with_chars = with_chars
        self._only_chats = template_tokens == "answers" or self._positions.of_chats

    def masks_row_bos(self) -> bool:
        """Whether a BOS before a sequence, which no document says, is left out wherever positions of documents are chosen."""
        of_documents = self._only_chats or self._positions.at_most_per_document is not None
        return of_documents or self._row_bos_id in self._masked_ids.tolist()

    def __call__(self, documents: Sequence[Document], *, pad_to: int | None, pad_id: int) -> list[Rendered]:
        """`pad_to`: the length of the sequences of which each document fills its own (None: documents share them)."""
        texts = [document for document in documents if isinstance(document, str)]
        of_texts = iter(self._ids_and_ends(texts))
        rendered = []
        for document in documents:
            if not isinstance(document, str) and len(document) and isinstance(document[0], dict):
                ids, flags, ends = self._render_chat(document)
                frame = TEMPLATE << ROLE_SHIFT
            else:
                ids, ends = next(of_texts) if isinstance(document, str) else (self._check_ids(document), None)
                frame = TEXT << ROLE_SHIFT
                flags = [frame | (MASKED if self._only_chats else 0)] * len(ids)
            if self._own_bos_goes and len(ids) and ids[0] == self._separator_id:
                ids, flags, ends = ids[1:], flags[1:], ends and ends[1:]
            rendered.append(self._finish(ids, flags, ends, frame, pad_to, pad_id))
        return rendered

    def _ids_and_ends(self, texts: list[str]) -> list[tuple[list[int], list[int] | None]]:
        """Token ids of texts, and where each token ends (None: nobody asked)."""
        if not self._with_chars or not texts:
            return [(ids, None) for ids in self._tokenize(texts)]
        encoded = self._tokenize(texts, return_offsets_mapping=True)
        ends = [[end for _, end in offsets] for offsets in encoded["offset_mapping"]]
        return list(zip(encoded["input_ids"], ends, strict=True))

    def _tokenize(self, texts: list[str], **options: Any) -> Any:
        if not texts:
            return []
        if self._tokenizer is None:
            raise InputError("dataset: it holds text, but the language model has no tokenizer; give token ids")
        try:
            encoded = self._tokenizer(
                texts, add_special_tokens=False, return_attention_mask=False, verbose=False, **options
            )
        except (TypeError, UnicodeEncodeError) as error:
            bad = next((text for text in texts if not _is_unicode(text)), None)
            if bad is None:
                raise
            raise InputError(f"dataset: a document holds half a surrogate pair: {bad[:60]!a}") from error
        return encoded if options else encoded["input_ids"]

    def _check_ids(self, document: Any) -> list[int]:
        ids = list(document)
        if not all(type(token) is int for token in ids):
            raise InputError(f"dataset: a document is {str(ids)[:60]!r}; text, token ids or chat messages are needed")
        if ids and not 0 <= min(ids) <= max(ids) < 1 << 31:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise InputError(f"dataset: a document holds {wrong} where a token id is needed")
        return ids

    def _render_chat(self, messages: Any) -> tuple[list[int], list[int], list[int] | None]:
        """Token ids, their flags, and where they end (None: not known, nor asked for)."""
        rules = self._positions
        asks_who = self._template_tokens == "answers" or rules.of_chats or rules.thinking != "keep"
        takes_all = self._template_tokens == "keep" and not asks_who
        is_fast = getattr(self._tokenizer, "is_fast", False)
        if takes_all:
            text = chat_text(self._tokenizer, messages)
            try:
                if not is_fast:
                    raise InputError("no places of tokens")
                _, found, changed = message_spans(self._tokenizer, messages)
            except InputError:  # nobody has asked who says what
                ids = self._tokenize([text])[0]
                return ids, [UNKNOWN << ROLE_SHIFT] * len(ids), None
        elif not is_fast:
            asked, off = f"template_tokens: {self._template_tokens}", "template_tokens: keep"
            if self._template_tokens == "keep":
                asked, off = "positions: it", "positions: null"
            raise InputError(
                f"{asked} takes a tokenizer that knows which characters a token stands for, and a "
                f"{type(self._tokenizer).__name__} does not; set {off}"
            )
        else:
            text, found, changed = message_spans(self._tokenizer, messages)
        encoded = self._tokenize([text], return_offsets_mapping=True)
        offsets = with_white_space(encoded["offset_mapping"][0])
        masked = [False] * len(offsets)
        if self._template_tokens != "keep":
            answers = self._template_tokens == "answers"
            spans = [span for span, i in found if not answers or messages[i]["role"] == "assistant"]
            masked = [not inside for inside in in_spans(offsets, spans)]
        said = said_by(self._tokenizer, messages, text, found, changed)
        if asks_who and (changed if self._template_tokens == "answers" else said.unsure):
            raise places_unknown(text)
        roles = roles_of(messages, said, text, offsets)
        if takes_all and said.unsure:
            roles = [UNKNOWN] * len(roles)
        chosen = chosen_positions(rules, messages, said, offsets)
        flags = [
            role << ROLE_SHIFT | (MASKED if mask or not use else 0)
            for role, use, mask in zip(roles, chosen, masked, strict=True)
        ]
        return encoded["input_ids"][0], flags, [end for _, end in offsets]

    def _finish(
        self, ids: list[int], flags: list[int], ends: list[int] | None, frame: int, pad_to: int | None, pad_id: int
    ) -> Rendered:
        """`frame`: the flags of what goes around."""
        tokens_T = torch.tensor(ids, dtype=torch.long)
        flags_T = torch.tensor(flags, dtype=torch.uint8)
        chars_T3 = torch.zeros((len(ids), 3), dtype=torch.int32)
        if not len(ids):
            return tokens_T, flags_T, chars_T3
        if self._with_chars:
            chars_T3 = _characters(ends or [NO_CHARACTERS] * len(ids))
        flag = frame | (MASKED if self._only_chats else 0)
        if self._bos_id is not None and ids[0] != self._bos_id:
            tokens_T = torch.cat([torch.tensor([self._bos_id]), tokens_T])
            flags_T = torch.nn.functional.pad(flags_T, (1, 0), value=flag)
            chars_T3 = torch.cat([torch.tensor([[0, NO_CHARACTERS, 0]], dtype=torch.int32), chars_T3])
        if self._separator_id is not None and ids[-1] != self._separator_id:
            tokens_T = torch.cat([tokens_T, torch.tensor([self._separator_id])])
            flags_T = torch.nn.functional.pad(flags_T, (0, 1), value=flag)
            own_T3 = torch.tensor([[int(chars_T3[:, 1].max()), NO_CHARACTERS, 0]], dtype=torch.int32)
            chars_T3 = torch.cat([chars_T3, own_T3])
        chars_T3[-1, 2] = 1
        flags_T |= torch.isin(tokens_T, self._masked_ids).to(torch.uint8) * MASKED
        limit = self._positions.at_most_per_document
        if limit is not None:
            self._spread(limit, tokens_T, flags_T, pad_to)
        flags_T[0] |= DOCUMENT_START
        if pad_to is not None:
            n_missing = row_ends(tokens_T, pad_to, self._row_bos_id)[-1] - tokens_T.numel()
            tokens_T = torch.nn.functional.pad(tokens_T, (0, n_missing), value=pad_id)
            flags_T = torch.nn.functional.pad(flags_T, (0, n_missing), value=PADDING)
            chars_T3 = torch.nn.functional.pad(chars_T3, (0, 0, 0, n_missing))
        return tokens_T, flags_T, chars_T3

    def _spread(self, limit: int, tokens_T: torch.Tensor, flags_T: torch.Tensor, pad_to: int | None) -> None:
        """Mask all but `limit` of a document's positions; none is wasted on a first position that will be left out."""
        usable_U = (flags_T & MASKED == 0).nonzero()[:, 0]
        if len(usable_U) <= limit:
            return
        first = [0] * (self._leaves_first and self._isolates)
        if self._leaves_first and pad_to is not None:
            begins = [0, *row_ends(tokens_T, pad_to, self._row_bos_id)[:-1]]
            first = [at for at in begins if self._row_bos_id is None or int(tokens_T[at]) == self._row_bos_id]
        usable_U = usable_U[~torch.isin(usable_U, torch.tensor(first, dtype=torch.long))]
        n = min(limit, len(usable_U))
        flags_T |= MASKED
        flags_T[usable_U[torch.arange(n) * len(usable_U) // max(n, 1)]] ^= MASKED


def _characters(ends: list[int]) -> torch.Tensor:
    """`chars_T3` of tokens that end there. Of several that end at one character, its bytes, the last one ends it."""
    ends_T = torch.tensor(ends, dtype=torch.int32)
    ends_T[:-1][ends_T[:-1] == ends_T[1:]] = NO_CHARACTERS
    ended_T = torch.nn.functional.pad(ends_T.clamp(min=0).cummax(0).values[:-1], (1, 0))
    return torch.stack([ended_T, ends_T, torch.zeros_like(ends_T)], dim=1)


def row_ends(tokens_T: torch.Tensor, length: int, bos_id: int | None, at_most: int | None = None) -> list[int]:
    """Where the sequences end that a run of tokens is cut into, the last perhaps beyond it.

    Each takes `length` tokens, or one fewer where `bos_id` (None: no BOS) goes before them: where they do not begin
    with it already.
    """
    ends, at = [], 0
    while at < tokens_T.numel() and len(ends) != at_most:
        at += length - (bos_id is not None and int(tokens_T[at]) != bos_id)
        ends.append(at)
    return ends


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
