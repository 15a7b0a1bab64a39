"""Documents in, batches of token sequences out.

H harvest batch (sequences) · S sequence · T a run of tokens of any length.

Policy, all of it explicit: `bos` says where the beginning-of-sequence token goes, `separator` what stands between
documents, `pack` whether documents share sequences, `isolate_documents` whether attention may cross them, and the
mask says which positions may reach training: never padding, never the first position unless `keep_first_position`
(whatever its token, it collects an attention sink whose norm outweighs every other position), never
`mask_token_ids`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from crosscode.config.checked import checked, signature_with
from crosscode.config.data import TokenPolicy
from crosscode.data.text.aligned import Aligner, pieces_of
from crosscode.data.text.documents import Document, DocumentSource
from crosscode.data.text.labels import ROLES, TEMPLATE, TEXT
from crosscode.data.text.mixture import parts_of
from crosscode.data.text.render import (
    DOCUMENT_START,
    MASKED,
    NO_CHARACTERS,
    PADDING,
    ROLE_SHIFT,
    DocumentRenderer,
    Frame,
    row_ends,
)
from crosscode.data.text.token_batch import TokenBatch
from crosscode.data.text.token_chunks import Chunk, ChunkReader, Start, Tokens, WorkerChunks
from crosscode.data.text.tokenizers import tokenizer_rules
from crosscode.errors import InputError, check_settings
from crosscode.seeds import derived_seed


class TokenSequenceLoader:
    """Sequences of tokens from a document source; iterable any number of times.

    `policy` says how (`TokenPolicy`: `sequence_length` and all that has a default); its fields may be given as keywords
    instead, or beside it to change it. Sources without random access keep their order with `shuffle`.
    `mask_special_tokens` adds the tokenizer's special ids to `mask_token_ids`. `others`: tokenizers of models that read the same
    text in tokens of their own, each with the number of positions that they take (None: any); see `data.text.aligned`.

    `iter()` starts from the beginning, or from the state that was loaded; `state_dict()` is the position of the
    latest iterator. Tokens that do not fill the last sequence of an epoch are padded; sequences without one usable
    position are left out. Raises InputError for a bad field, and where an epoch yields no sequence at all.
    """

    def __init__(
        self,
        source: DocumentSource,
        tokenizer: Any,
        policy: TokenPolicy | None = None,
        *,
        others: Sequence[tuple[Any, int | None]] = (),
        **fields: Any,
    ) -> None:
        if policy is None or fields:
            policy = checked(TokenPolicy, {**(policy.model_dump() if policy else {}), **fields})
        self.source, self.tokenizer, self.policy = source, tokenizer, policy
        special = getattr(tokenizer, "all_special_ids", None) or []
        self.masked_ids = sorted({*policy.mask_token_ids, *(special if policy.mask_special_tokens else ())})
        frame = Frame.of(tokenizer, policy)
        self.row_bos_id, self.separator_id, self.pad_id = frame.row_bos_id, frame.separator_id, frame.pad_id
        self.bos_id = frame.bos_id if frame.row_bos_id is None else frame.row_bos_id
        self.render = DocumentRenderer(
            tokenizer,
            bos_id=frame.bos_id,
            row_bos_id=frame.row_bos_id,
            separator_id=frame.separator_id,
            template_tokens=policy.template_tokens,
            positions=policy.positions,
            masked_ids=self.masked_ids,
            leaves_first=not policy.keeps_first(),
            isolates=policy.isolate_documents,
            with_chars=bool(others),
        )
        self.others = tuple(others)
        self.aligners = [Aligner(tokenizer, other, policy, limit) for other, limit in others]
        self._start: dict[str, Any] | None = None
        self._iterator: _SequenceIterator | None = None

    __signature__ = signature_with(__init__, TokenPolicy)

    @property
    def source_names(self) -> list[str]:
        """By the numbers of `Labels.source_T`, each once."""
        names = [part.name for part in parts_of(self.source)] or [self.source.name]
        return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]

    @property
    def groupings(self) -> dict[str, Sequence[str]]:
        """Ways to group its tokens, with the names by the numbers of `Labels.groups_T2`."""
        return {"source": self.source_names, "role": ROLES}

    def fresh(self, **changes: Any) -> TokenSequenceLoader:
        """The same loader at its beginning, with some fields of its policy changed; neither moves the other."""
        return TokenSequenceLoader(self.source, self.tokenizer, self.policy, others=self.others, **changes)

    def __iter__(self) -> Iterator[TokenBatch]:
        start, self._start = self._start, None
        self._iterator = _SequenceIterator(self, start)
        return self._iterator

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch that was handed out: tensors, ints and strings."""
        if self._start is not None:
            return self._start
        return (self._iterator or _SequenceIterator(self, None)).state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next `iter()` continues from `state`. Raises InputError if it was saved under other settings."""
        check_settings(json.loads(self.describe()), json.loads(state["settings"]), may_lack=["tokenizer"])
        self._start = dict(state)
        self._iterator = None

    def describe(self) -> str:
        """Everything that decides the tokens and the mask, as JSON with sorted keys."""
        template = getattr(self.tokenizer, "chat_template", None)
        settings = {
            **self.policy.recorded(),
            "masked_ids": self.masked_ids,
            "bos_id": self.bos_id,
            "separator_id": self.separator_id,
            "pad_id": self.pad_id,
            "chat_template": None if template is None else hashlib.sha256(str(template).encode()).hexdigest()[:16],
            "dataset": self.source.fingerprint,
            "tokenizer": tokenizer_rules(self.tokenizer),
        }
        if self.others:
            settings["other_tokenizers"] = [tokenizer_rules(tokenizer) for tokenizer, _ in self.others]
        return json.dumps(settings, sort_keys=True)


class _SequenceIterator(Iterator[TokenBatch]):
    """Position: the epoch, where the oldest chunk that still has tokens begins, and how many of its tokens are used."""

    def __init__(self, loader: TokenSequenceLoader, start: dict[str, Any] | None) -> None:
        self._loader = loader
        self._policy = loader.policy
        self._settings = loader.describe()
        state = start or {}
        self._epoch = int(state.get("epoch", 0))
        self._n_sequences = int(state.get("n_sequences", 0))
        self._begin(Start(str(state.get("source", "")), int(state.get("n_read", 0))), int(state.get("n_used", 0)))

    def _begin(self, start: Start, n_used: int) -> None:
        """Go to a place of the epoch; nothing is read yet."""
        self._tokens = Tokens.full((0,), 0, 0)
        self._chunks: Iterator[Chunk] | None = None
        self._reader: ChunkReader | None = None
        self._starts: deque[tuple[Start, int]] = deque()
        self._documents: deque[dict[int, Document]] = deque()
        self._next_start, self._n_skipped = start, n_used
        self._n_read, self._at_end = start.n_read, False

    def state_dict(self) -> dict[str, Any]:
        start, n_used = self._next_start, self._n_skipped
        if self._starts:
            start, n_tokens = self._starts[0]
            n_used = n_tokens - (len(self._tokens) - sum(n for _, n in itertools.islice(self._starts, 1, None)))
        return {
            "settings": self._settings,
            "epoch": self._epoch,
            "n_sequences": self._n_sequences,
            "source": start.source,
            "n_read": start.n_read,
            "n_used": n_used,
        }

    def __next__(self) -> TokenBatch:
        while True:
            if self._policy.epochs is not None and self._epoch >= self._policy.epochs:
                raise StopIteration
            batch = self._cut_batch()
            if batch is not None:
                return batch
            self._next_epoch()

    def _cut_batch(self) -> TokenBatch | None:
        """The next batch of this epoch that has a usable position, or None at the epoch's end."""
        length, n_rows = self._policy.sequence_length, self._policy.batch_size
        wanted = length * n_rows
        while True:
            while len(self._tokens) < wanted and not self._at_end:
                self._read_chunk()
            if len(self._tokens) == 0:
                return None
            ends = row_ends(self._tokens.ids_T, length, self._loader.row_bos_id, n_rows)
            batch = self._make_batch(ends)
            self._tokens = self._tokens[ends[-1] :]
            self._forget_used_chunks()
            if batch is not None:
                self._n_sequences += batch.tokens_HS.shape[0]
                return batch

    def _make_batch(self, ends: list[int]) -> TokenBatch | None:
        """The sequences that end there, the first from the beginning of the tokens that wait."""
        loader, policy = self._loader, self._policy
        whole = Tokens.full((len(ends), policy.sequence_length), loader.pad_id, PADDING)
        tokens_HS, flags_HS = whole.ids_T, whole.flags_T
        for h, (begin, end) in enumerate(itertools.pairwise([0, *ends])):
            row, at = self._tokens[begin:end], policy.sequence_length - (end - begin)
            for own_HS, own_T in zip(whole.all(), row.all(), strict=True):
                own_HS[h, at : at + len(row)] = own_T
                own_HS[h, :at] = own_T[0]
            if at:
                tokens_HS[h, 0] = loader.row_bos_id or 0
                whole.chars_T3[h, :at, 1:] = torch.tensor([NO_CHARACTERS, 0], dtype=torch.int32)
                frame = TEMPLATE if int(flags_HS[h, 0]) >> ROLE_SHIFT else TEXT
                flags_HS[h, 0] = DOCUMENT_START | frame << ROLE_SHIFT | MASKED * loader.render.masks_row_bos()
        mask_HS = (flags_HS & (PADDING | MASKED)) == 0
        segments_HS = None
        if policy.isolate_documents:
            starts_HS = (flags_HS & DOCUMENT_START) != 0
            starts_HS[:, 0] = True
            if loader.row_bos_id is not None:
                starts_HS[:, 1] = False
            segments_HS = starts_HS.long().cumsum(dim=1) - 1
            if not policy.keeps_first():
                mask_HS &= ~starts_HS
        elif not policy.keeps_first():
            mask_HS[:, 0] = False
        pieces = pieces_of(whole, self._documents, loader.row_bos_id is not None) if loader.aligners else []
        others = [align(pieces, policy.sequence_length) for align in loader.aligners]
        n_usable = int(mask_HS.sum())
        for other in others:
            mask_HS &= other.place_HS >= 0
        n_apart = n_usable - int(mask_HS.sum())
        usable_H = mask_HS.any(dim=1)
        if not usable_H.any():
            return None
        segments_HS = None if segments_HS is None else segments_HS[usable_H]
        labels, kept = whole.labels()[usable_H], tuple(other[usable_H] for other in others)
        return TokenBatch(tokens_HS[usable_H], mask_HS[usable_H], segments_HS, self._epoch, labels, kept, n_apart)

    def _next_epoch(self) -> None:
        if self._n_sequences == 0:
            raise InputError(self._nothing_usable())
        self._epoch += 1
        self._n_sequences = 0
        assert self._reader is not None
        self._begin(self._reader.next_epoch, 0)

    def _nothing_usable(self) -> str:
        policy, name = self._policy, self._loader.source.name
        if self._n_read == 0:
            return f"dataset {name!r} is empty"
        if policy.positions is not None and policy.positions.of_chats:
            rules = policy.positions.model_dump(exclude_defaults=True)
            return f"dataset {name!r}: its {self._n_read} documents hold no position that positions = {rules} leaves"
        if policy.split != "all":
            return (
                f"dataset {name!r}: its {self._n_read} documents leave nothing in the {policy.split} split "
                f"(validation_fraction {policy.validation_fraction})"
            )
        return f"dataset {name!r}: its {self._n_read} documents hold no usable position"

    def _read_chunk(self) -> None:
        """Append the tokens of the next documents that are not used yet."""
        if self._chunks is None:
            self._chunks = self._open_chunks()
        chunk = next(self._chunks, None)
        if chunk is None:
            self._at_end = True
            return
        self._n_read = chunk.n_read
        self._starts.append((chunk.start, len(chunk.tokens)))
        self._documents.append(chunk.documents if self._loader.others else {})
        skipped, self._n_skipped = self._n_skipped, 0
        self._tokens = self._tokens + chunk.tokens[skipped:]

    def _forget_used_chunks(self) -> None:
        """Keep the chunks that have tokens left, or at least the last one: it knows the position."""
        n_left = len(self._tokens)
        while len(self._starts) > 1 and sum(n for _, n in itertools.islice(self._starts, 1, None)) >= n_left:
            self._starts.popleft()
            self._documents.popleft()

    def _open_chunks(self) -> Iterator[Chunk]:
        loader, policy = self._loader, self._policy
        order_seed = derived_seed(policy.seed, self._epoch) if policy.shuffle else None
        self._reader = reader = ChunkReader(
            loader.source.open(order_seed=order_seed, state=self._next_start.source or None),
            self._next_start,
            policy,
            partial(loader.render, pad_to=None if policy.pack else policy.sequence_length, pad_id=loader.pad_id),
        )
        return WorkerChunks(reader, policy.n_workers) if policy.n_workers else iter(reader)
