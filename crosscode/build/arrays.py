"""Experiments on activations of the user's own: rows that train, rows that are held out and kept in the run directory.

Axes: N held-out rows · B tokens · M models · P hookpoints · D width · H sequences · S sequence.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosscode.build.heldout import AnyExperiment, HeldoutBatch
from crosscode.config.arrays import ArrayFile, ArraysSource
from crosscode.config.experiment import ExperimentConfig
from crosscode.data.arrays.heldout_file import Sections, read_header, write_heldout
from crosscode.data.arrays.in_order import BATCHES
from crosscode.data.arrays.opening import open_input, open_safetensors
from crosscode.data.arrays.random_access import ArrayInput
from crosscode.data.arrays.rows import Arrays
from crosscode.data.harvest.language_models import available_device
from crosscode.data.rows import RowSource
from crosscode.errors import InputError, at_field
from crosscode.files import new_folder
from crosscode.models.split import Split
from crosscode.trainers.callbacks import Callback
from crosscode.widths import Widths

HELDOUT_FILE, TOKENIZER = "heldout.safetensors", "tokenizer"
_TAGS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_SEQUENCES_AT_ONCE = 16


@dataclass(frozen=True)
class GivenArrays:
    """What was passed in Python: inputs, the same for evaluation (None: a share of the rows), tokens and tokenizer.

    `tokens`: token ids of all rows, (N,) or (H, S) with H * S = N.
    """

    inputs: Sequence[ArrayInput]
    heldout: Sequence[ArrayInput] | None = None
    tokens: Tensor | None = None
    tokenizer: Any = None


@dataclass(frozen=True, kw_only=True)
class ArrayExperiment(AnyExperiment):
    """`arrays` is None where only what the run directory holds is needed."""

    arrays: Arrays | None = None
    heldout_arrays: Arrays | None = None
    given: GivenArrays | None = None

    @property
    def dims(self) -> tuple[int, int, int]:
        if self.arrays is not None:
            return self.arrays.dims
        n_models, n_hookpoints = self.config.n_positions()
        read_header(self._file)
        return n_models, n_hookpoints, open_safetensors(self._file, "acts").row_shape[-1]

    @property
    def widths_MP(self) -> Widths:
        return super().widths_MP if self.arrays is None else self.arrays.widths_MP

    @property
    def device(self) -> torch.device:
        return available_device(self.config.device)

    @property
    def _file(self) -> Path:
        return self.config.run_path() / HELDOUT_FILE

    @cached_property
    def n_heldout(self) -> int:
        """Rows that training never sees: a share of those that there are, or, where nobody knows, that training takes."""
        arrays, config = self.arrays, self.config
        assert arrays is not None
        if self._file.is_file():  # of a run that goes on
            return int(read_header(self._file)["__metadata__"]["n_heldout"])
        if self.heldout_arrays is not None:
            return 0
        n_rows = config.train.n_tokens if arrays.n_rows is None else arrays.n_rows
        wanted = max(1, round(config.data.validation_fraction * n_rows))
        tokens = None if self.given is None else self.given.tokens
        if tokens is not None and tokens.ndim == 2:  # whole sequences
            S = tokens.shape[1]
            wanted = max(1, round(wanted / S)) * S
        if arrays.n_rows is None:
            wanted = min(wanted, config.evaluation.n_tokens)
        elif wanted >= arrays.n_rows:
            raise InputError(
                f"data.validation_fraction = {config.data.validation_fraction}: holds out {wanted} of {arrays.n_rows} "
                "rows, and leaves none to train on"
            )
        return wanted

    def all_rows(self) -> RowSource:
        assert self.arrays is not None
        data = self.config.data
        _ = self._heldout_rows  # an iterator gives its first rows to evaluation
        return self.arrays.rows(
            self.n_heldout,
            epochs=data.epochs,
            seed=self.config.seed,
            window=data.shuffle_buffer_size,
            read_block=data.store_read_block,
        )

    # ---- held out

    @cached_property
    def _heldout_rows(self) -> list[Tensor] | None:
        """In memory, of inputs that cannot be read twice; else None."""
        if self.arrays is None or self.heldout_arrays is not None or self.arrays.n_rows is not None:
            return None
        return list(self.arrays.heldout(self.n_heldout, self.n_heldout))

    def _heldout_chunks(self) -> tuple[int, Iterable[Tensor]]:
        """How many rows are kept for evaluation, and these rows."""
        assert self.arrays is not None
        n_wanted = self.config.evaluation.n_tokens
        if self._heldout_rows is not None:
            return sum(map(len, self._heldout_rows)), self._heldout_rows
        if self.heldout_arrays is None:
            n_kept = min(self.n_heldout, max(n_wanted, self.sequence_length))
            return n_kept, self.arrays.heldout(self.n_heldout, n_kept)
        if self.heldout_arrays.n_rows is None:
            rows = list(self.heldout_arrays.chunks(0, n_wanted))
            return sum(map(len, rows)), rows
        n_kept = min(self.heldout_arrays.n_rows, n_wanted)
        return n_kept, self.heldout_arrays.chunks(0, n_kept)

    @property
    def sequence_length(self) -> int:
        tokens = None if self.given is None else self.given.tokens
        return 1 if tokens is None or tokens.ndim == 1 else tokens.shape[1]

    def all_heldout(self) -> Iterator[HeldoutBatch]:
        if not self._file.is_file():
            raise InputError(f"run: {str(self._file)!r} is missing: nothing is held out to look at")
        read_header(self._file)
        with closing(open_safetensors(self._file, "acts")) as acts:
            H, S = (tokens_HS := self._tokens_HS(acts.n_rows)).shape
            n_at_once = max(_SEQUENCES_AT_ONCE, 2048 // S)
            for first in range(0, H, n_at_once):
                end = min(H, first + n_at_once)
                rows = acts.read(np.arange(first * S, min(end * S, acts.n_rows))).float()
                mask_HS = torch.arange(first * S, end * S).view(-1, S) < acts.n_rows
                acts_HSMPD = torch.zeros(*mask_HS.shape, *rows.shape[1:])
                acts_HSMPD[mask_HS] = rows
                yield HeldoutBatch(tokens_HS[first:end], mask_HS, acts_HSMPD.to(self.device))

    def _tokens_HS(self, n_rows: int) -> Tensor:
        """Tokens as they were given, or the numbers of the rows, each by itself."""
        entries = read_header(self._file)
        if "tokens" not in entries:
            return torch.arange(n_rows)[:, None] + int(entries["__metadata__"]["first_row"])
        from safetensors import safe_open

        with safe_open(self._file, "pt") as file:
            return file.get_tensor("tokens")

    @property
    def tokenizer(self) -> Any:
        folder = self.config.run_path() / TOKENIZER
        if not folder.is_dir():
            return NumberTokenizer("" if "tokens" in read_header(self._file) else "row ")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    def callbacks(self) -> list[Callback]:
        return [KeepHeldout(self)]

    def keep_heldout(self) -> None:
        """Write what `heldout_batches` reads, so that a run can be looked at without its source."""
        if self.arrays is None or self._file.is_file():
            return
        n_rows, chunks = self._heldout_chunks()
        if n_rows == 0:
            raise InputError("acts: no row is left for evaluation; give more of them, or `heldout`")
        first_row = 0 if self.arrays.n_rows is None or self.heldout_arrays else self.arrays.n_rows - self.n_heldout
        dtype = (self.heldout_arrays or self.arrays).inputs[0].dtype
        sections: Sections = {"acts": (_TAGS[dtype], (n_rows, *self.dims), dtype.itemsize)}
        parts: Iterator[Any] = (rows.contiguous().flatten(1).view(torch.uint8).numpy() for rows in chunks)
        tokens = None if self.given is None else self.given.tokens
        tail: list[Any] = []
        if tokens is not None:
            tokens_HS = _sequences(tokens.flatten()[first_row : first_row + n_rows], tokens, self.config)
            sections["tokens"] = ("I64", tuple(tokens_HS.shape), 8)
            tail = [tokens_HS.numpy()]
        parts = itertools.chain(parts, tail)
        write_heldout(self._file, sections, parts, first_row=first_row, n_heldout=self.n_heldout)
        if self.given is not None and self.given.tokenizer is not None:
            with new_folder(self.config.run_path() / TOKENIZER, "tokenizer_config.json") as folder:
                self.given.tokenizer.save_pretrained(folder)

    def keep_heldout_in(self, path: Path) -> None:
        shutil.copyfile(self._file, path / HELDOUT_FILE)
        if (tokenizer := self.config.run_path() / TOKENIZER).is_dir():
            shutil.copytree(tokenizer, path / TOKENIZER)


class KeepHeldout(Callback):
    def __init__(self, experiment: ArrayExperiment):
        self.experiment = experiment

    def on_start(self, trainer: Any) -> None:
        self.experiment.keep_heldout()


class NumberTokenizer:
    """Shows ids as numbers: of tokens without a tokenizer, or of rows."""

    all_special_ids: tuple[int, ...] = ()

    def __init__(self, prefix: str):
        self.prefix = prefix

    def get_vocab(self) -> dict[str, int]:
        return {}

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return f"{self.prefix}{token_id}"


def open_arrays(
    config: ExperimentConfig, split: Split, given: GivenArrays | None = None, *, to_train: bool = True
) -> ArrayExperiment:
    """Inputs from what was passed, or from the files that the config names, checked against each other.

    Raises:
        InputError: the activations were passed in Python once, and now are not; or as `Arrays` and `open_input`.
    """
    source = config.data.source
    assert isinstance(source, ArraysSource)
    if not to_train:
        return ArrayExperiment(config=config, split=split)
    if given is None:
        if not source.files:
            again = f"; pass them again: crosscode.open({str(config.run_path())!r}).resume(acts)"
            if BATCHES in source.origin:
                again = " and which has no position to go on from; begin a new run in Python, with finetune_from"
            raise InputError(f"data.source: the activations were {source.origin}, which no file holds{again}")
        heldout = _opened(source.heldout_files, "heldout_files") if source.heldout_files else None
        given = GivenArrays(_opened(source.files, "files"), heldout)
    arrays = Arrays(given.inputs, *config.n_positions())
    heldout_arrays = None if given.heldout is None else Arrays(given.heldout, *config.n_positions())
    if heldout_arrays is not None and heldout_arrays.widths_MP != arrays.widths_MP:
        raise InputError(
            f"heldout: vectors of widths {heldout_arrays.widths_MP}, but those of acts are {arrays.widths_MP}"
        )
    split.check_widths(config.position_names(), arrays.widths_MP)
    _check_tokens(given, arrays)
    return ArrayExperiment(config=config, split=split, arrays=arrays, heldout_arrays=heldout_arrays, given=given)


def _opened(files: Sequence[ArrayFile], name: str) -> list[ArrayInput]:
    found = []
    for i, file in enumerate(files):
        with at_field(f"data.source.{name}.{i}"):
            found.append(open_input(file.path, file.key))
    return found


def _check_tokens(given: GivenArrays, arrays: Arrays) -> None:
    if given.tokenizer is not None and given.tokens is None:
        raise InputError("tokenizer: is for tokens; pass tokens= as well")
    if given.tokenizer is not None and not hasattr(given.tokenizer, "save_pretrained"):
        raise InputError(f"tokenizer: {type(given.tokenizer).__name__}: must be one of `transformers`, or its name")
    if given.tokens is None:
        return
    if given.heldout is not None:
        raise InputError("tokens: are those of acts, of which no row is held out beside heldout=; give one of the two")
    if given.tokens.ndim not in (1, 2) or given.tokens.is_floating_point() or given.tokens.numel() != arrays.n_rows:
        raise InputError(
            f"tokens: {tuple(given.tokens.shape)} of {given.tokens.dtype}: must be a token id for each of the "
            f"{arrays.n_rows or 'unknown number of'} rows, (N,) or (H, S) with H * S = N"
        )
    if (least := int(given.tokens.min())) < 0:
        raise InputError(f"tokens: holds {least}: token ids are 0 or more")


def _sequences(tokens_N: Tensor, given: Tensor, config: ExperimentConfig) -> Tensor:
    """The tokens of held-out rows, as sequences; the last one may be filled up with zeros that do not count."""
    S = given.shape[1] if given.ndim == 2 else min(config.data.sequence_length, len(tokens_N))
    H = -(-len(tokens_N) // S)
    tokens_HS = torch.zeros(H * S, dtype=torch.int64)
    tokens_HS[: len(tokens_N)] = tokens_N.to(torch.int64).cpu()
    return tokens_HS.view(H, S)
