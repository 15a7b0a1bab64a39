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
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch

from crosscode.data.text.documents import Document, DocumentSource
from crosscode.data.text.render import DOCUMENT_START, MASKED, PADDING, DocumentRenderer, TemplateTokens
from crosscode.data.text.token_arguments import check_token_arguments
from crosscode.data.text.token_chunks import Chunk, ChunkReader, Selection, Split, Start, WorkerChunks
from crosscode.errors import InputError

Bos = Literal["sequence", "document", "none"]
Separator = Literal["eos", "none"]


@dataclass(frozen=True)
class TokenBatch:
    """H sequences of S tokens.

    `mask_HS` is True where the activation may be used. `segments_HS`, only with document isolation, numbers the
    documents along each sequence. `epoch` counts from 0; a batch never crosses the end of an epoch.
    """

    tokens_HS: torch.Tensor
    mask_HS: torch.Tensor
    segments_HS: torch.Tensor | None
    epoch: int


class TokenSequenceLoader:
    """Sequences of `sequence_length` tokens from a document source; iterable any number of times.

    `batch_size`: sequences a batch (the last batch of an epoch may hold fewer). `epochs`: None reads the source for
    ever. `shuffle` permutes the documents anew each epoch (sources with random access only); `seed` decides the
    permutations. `mask_special_tokens` adds the tokenizer's special ids to `mask_token_ids`. `template_tokens` says
    whether the tokens that a chat template adds are kept or masked. `split` with `validation_fraction` keeps the
    documents of "train" and "validation" apart by their content: equal documents are always on the same side.
    `worker` = (index, count) reads every count-th document, for several processes that share a data set. `n_workers`
    threads tokenize ahead of the reader (0: none); the batches are the same for any number of them.

    `iter()` starts from the beginning, or from the state that was loaded; `state_dict()` is the position of the
    latest iterator. Tokens that do not fill the last sequence of an epoch are padded; sequences without one usable
    position are left out. Raises InputError where an epoch yields no sequence at all.
    """

    def __init__(
        self,
        source: DocumentSource,
        tokenizer: Any,
        *,
        sequence_length: int,
        batch_size: int = 8,
        epochs: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        bos: Bos = "sequence",
        separator: Separator = "eos",
        pack: bool = True,
        isolate_documents: bool = False,
        keep_first_position: bool = False,
        mask_special_tokens: bool = False,
        mask_token_ids: Sequence[int] = (),
        template_tokens: TemplateTokens = "keep",
        split: Split = "all",
        validation_fraction: float = 0.0,
        worker: tuple[int, int] = (0, 1),
        n_workers: int = 0,
    ) -> None:
        self._arguments = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        check_token_arguments(self._arguments)
        self.source = source
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.epochs = epochs
        self.seed = seed
        self.shuffle = shuffle
        self.isolate_documents = isolate_documents
        self.keep_first_position = keep_first_position
        self.split: Split = split
        self.validation_fraction = validation_fraction
        self.worker = worker
        self.n_workers = n_workers
        self.selection = Selection(split, validation_fraction, worker)
        self.bos: Bos = bos
        self.pack = pack
        self.separator: Separator = separator
        special = getattr(tokenizer, "all_special_ids", None) or []
        self.masked_ids = sorted({*mask_token_ids, *(special if mask_special_tokens else ())})
        self.bos_id: int | None = None if bos == "none" else getattr(tokenizer, "bos_token_id", None)
        self.separator_id = getattr(tokenizer, "eos_token_id", None) if separator == "eos" and pack else None
        self.render = DocumentRenderer(
            tokenizer,
            bos_id=self.bos_id if bos == "document" else None,
            separator_id=self.separator_id,
            template_tokens=template_tokens,
        )
        pad_id = getattr(tokenizer, "pad_token_id", None)
        eos_id = getattr(tokenizer, "eos_token_id", None)
        self.pad_id = next((token for token in (pad_id, eos_id) if token is not None), 0)
        self._start: dict[str, Any] | None = None
        self._iterator: _SequenceIterator | None = None

    def fresh(self, **changes: Any) -> TokenSequenceLoader:
        """The same loader at its beginning, with some arguments changed; neither moves the other."""
        return TokenSequenceLoader(**{**self._arguments, **changes})

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
        if state["settings"] != self.describe():
            mine, theirs = json.loads(self.describe()), json.loads(state["settings"])
            name = next(key for key in mine if mine[key] != theirs.get(key))
            raise InputError(f"data state: {name} was {theirs.get(name)!r} when it was saved and is {mine[name]!r} now")
        self._start = dict(state)
        self._iterator = None

    def describe(self) -> str:
        """Everything that decides the tokens and the mask, as JSON with sorted keys."""
        skipped = ("source", "tokenizer", "epochs", "n_workers", "mask_special_tokens", "mask_token_ids")
        settings = {key: value for key, value in self._arguments.items() if key not in skipped}
        template = getattr(self.tokenizer, "chat_template", None)
        settings |= {
            "masked_ids": self.masked_ids,
            "bos_id": self.bos_id,
            "separator_id": self.separator_id,
            "pad_id": self.pad_id,
            "chat_template": None if template is None else hashlib.sha256(str(template).encode()).hexdigest()[:16],
            "dataset": self.source.fingerprint,
        }
        return json.dumps(settings, sort_keys=True)

    def selects(self, document: Document) -> bool:
        """Whether `document` is on this loader's side of the validation split: decided by its content alone."""
        return self.selection.has(document)


class _SequenceIterator(Iterator[TokenBatch]):
    """Position: the epoch, where the oldest chunk that still has tokens begins, and how many of its tokens are used."""

    def __init__(self, loader: TokenSequenceLoader, start: dict[str, Any] | None) -> None:
        self._loader = loader
        self._body = loader.sequence_length - (1 if loader.bos == "sequence" and loader.bos_id is not None else 0)
        state = start or {}
        self._epoch = int(state.get("epoch", 0))
        self._n_sequences = int(state.get("n_sequences", 0))
        self._begin(Start(str(state.get("source", "")), int(state.get("n_read", 0))), int(state.get("n_used", 0)))

    def _begin(self, start: Start, n_used: int) -> None:
        """Go to a place of the epoch; nothing is read yet."""
        self._tokens_T = torch.empty(0, dtype=torch.long)
        self._flags_T = torch.empty(0, dtype=torch.uint8)
        self._chunks: Iterator[Chunk] | None = None
        self._starts: deque[tuple[Start, int]] = deque()
        self._next_start, self._n_skipped = start, n_used
        self._n_read, self._at_end = start.n_read, False

    def state_dict(self) -> dict[str, Any]:
        start, n_used = self._next_start, self._n_skipped
        if self._starts:
            start, n_tokens = self._starts[0]
            n_used = n_tokens - (self._tokens_T.numel() - sum(n for _, n in islice(self._starts, 1, None)))
        return {
            "settings": self._loader.describe(),
            "epoch": self._epoch,
            "n_sequences": self._n_sequences,
            "source": start.source,
            "n_read": start.n_read,
            "n_used": n_used,
        }

    def __next__(self) -> TokenBatch:
        while True:
            if self._loader.epochs is not None and self._epoch >= self._loader.epochs:
                raise StopIteration
            batch = self._cut_batch()
            if batch is not None:
                return batch
            self._next_epoch()

    def _cut_batch(self) -> TokenBatch | None:
        """The next batch of this epoch that has a usable position, or None at the epoch's end."""
        wanted = self._body * self._loader.batch_size
        while True:
            while self._tokens_T.numel() < wanted and not self._at_end:
                self._read_chunk()
            if self._tokens_T.numel() == 0:
                return None
            n_tokens = min(wanted, self._tokens_T.numel())
            batch = self._make_batch(self._tokens_T[:n_tokens], self._flags_T[:n_tokens])
            self._tokens_T, self._flags_T = self._tokens_T[n_tokens:], self._flags_T[n_tokens:]
            self._forget_used_chunks()
            if batch is not None:
                self._n_sequences += batch.tokens_HS.shape[0]
                return batch

    def _make_batch(self, tokens_T: torch.Tensor, flags_T: torch.Tensor) -> TokenBatch | None:
        loader = self._loader
        n_missing = -tokens_T.numel() % self._body
        tokens_HS = torch.nn.functional.pad(tokens_T, (0, n_missing), value=loader.pad_id).view(-1, self._body)
        flags_HS = torch.nn.functional.pad(flags_T, (0, n_missing), value=PADDING).view(-1, self._body)
        if self._body < loader.sequence_length:
            tokens_HS = torch.nn.functional.pad(tokens_HS, (1, 0), value=loader.bos_id or 0)
            flags_HS = torch.nn.functional.pad(flags_HS, (1, 0), value=DOCUMENT_START)
        mask_HS = (flags_HS & (PADDING | MASKED)) == 0
        if loader.masked_ids:
            mask_HS &= ~torch.isin(tokens_HS, torch.tensor(loader.masked_ids))
        segments_HS = None
        if loader.isolate_documents:
            starts_HS = (flags_HS & DOCUMENT_START) != 0
            starts_HS[:, 0] = True
            if self._body < loader.sequence_length:
                starts_HS[:, 1] = False
            segments_HS = starts_HS.long().cumsum(dim=1) - 1
            if not loader.keep_first_position:
                mask_HS &= ~starts_HS
        elif not loader.keep_first_position:
            mask_HS[:, 0] = False
        usable_H = mask_HS.any(dim=1)
        if not usable_H.any():
            return None
        segments_HS = None if segments_HS is None else segments_HS[usable_H]
        return TokenBatch(tokens_HS[usable_H], mask_HS[usable_H], segments_HS, self._epoch)

    def _next_epoch(self) -> None:
        if self._n_sequences == 0:
            raise InputError(self._nothing_usable())
        self._epoch += 1
        self._n_sequences = 0
        self._begin(Start("", 0), 0)

    def _nothing_usable(self) -> str:
        loader = self._loader
        name = loader.source.name
        if self._n_read == 0:
            return f"dataset {name!r} is empty"
        if loader.split != "all":
            return (
                f"dataset {name!r}: its {self._n_read} documents leave nothing in the {loader.split} split "
                f"(validation_fraction {loader.validation_fraction})"
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
        self._starts.append((chunk.start, chunk.tokens_T.numel()))
        skipped, self._n_skipped = self._n_skipped, 0
        self._tokens_T = torch.cat([self._tokens_T, chunk.tokens_T[skipped:]])
        self._flags_T = torch.cat([self._flags_T, chunk.flags_T[skipped:]])

    def _forget_used_chunks(self) -> None:
        """Keep the chunks that have tokens left, or at least the last one: it knows the position."""
        n_left = self._tokens_T.numel()
        while len(self._starts) > 1 and sum(n for _, n in islice(self._starts, 1, None)) >= n_left:
            self._starts.popleft()

    def _open_chunks(self) -> Iterator[Chunk]:
        loader = self._loader
        order_seed = loader.seed * 1_000_003 + self._epoch if loader.shuffle else None
        reader = ChunkReader(
            loader.source.open(order_seed=order_seed, state=self._next_start.source or None),
            self._next_start,
            loader.selection,
            partial(loader.render, pad_to=None if loader.pack else self._body, pad_id=loader.pad_id),
        )
        return WorkerChunks(reader, loader.n_workers) if loader.n_workers else iter(reader)
