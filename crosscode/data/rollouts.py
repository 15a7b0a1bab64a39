"""What a language model writes: generated once, batch by batch, into a folder that is read like any other text.

    manifest.json                       what decides the texts; `n_batches` once all are there
    rollouts-000000-<crc>.jsonl ...     the texts of one batch of prompts; each appears whole or not at all
    lock                                held by the process that writes

A batch depends on its prompts and its number alone: what was killed goes on after its last batch, equal to the bit.

N prompts of a batch · S positions.
"""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crosscode.config.nested import flatten
from crosscode.config.sources import Rollouts
from crosscode.data.harvest.language_models import LanguageModel
from crosscode.data.schemas import RolloutsManifest
from crosscode.data.text.chats import chat_text
from crosscode.data.text.documents import Document, DocumentSource, hash_documents
from crosscode.data.text.prompts import prompt_ids
from crosscode.data.text.sources import wrap_documents
from crosscode.errors import InputError
from crosscode.files import check_is_no_link, held, is_temporary, remove, write_json, write_parts
from crosscode.formats import ROLLOUTS
from crosscode.seeds import derived_seed
from crosscode.stored import read_json

log = logging.getLogger("crosscode")

_BATCH = re.compile(r"rollouts-(\d{6,})-([0-9a-f]{8})\.jsonl")
_OPEN_THINKING = re.compile(r"<think>\s*\Z")
_END = "\ue0f1"
"""Stands for an answer; in no template."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RolloutFolder:
    """The folder in which rollouts of one recipe are kept.

    `recipe`: everything that decides the texts, as JSON: the rules, the files of the model, the prompts.
    """

    path: Path
    recipe: dict[str, Any]

    def whole(self) -> list[Document] | None:
        """The texts, or None where they are not all there yet. Raises InputError for another recipe, or damage."""
        manifest = self._manifest()
        if manifest is None or manifest["n_batches"] is None:
            return None
        batches = self._batches()
        if len(batches) != manifest["n_batches"]:
            raise InputError(
                f"{self}: {len(batches)} of its {manifest['n_batches']} batches are there; remove the folder"
            )
        return [document for batch in batches for document in batch]

    def fill(self, rules: Rollouts, prompts: DocumentSource, lm: LanguageModel, on_progress: Progress) -> None:
        """Generate what is not there yet. `on_progress(n, n_all)`: prompts.

        Raises:
            InputError: another process writes there, foreign files, no prompt that can be used, a disk that is full.
        """
        writer = _Writer(lm, rules)
        batches = writer.batches(prompts)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with held(self.path / "lock", f"{self} is being written by another process"):
                self._begin()
                done = self._batches()
                seen = {hash_documents([document]) for batch in done for document in batch}
                for i in range(len(done), len(batches)):
                    on_progress(i * rules.batch_size, sum(map(len, batches)))
                    new = {hash_documents([document]): document for document in writer.write(batches[i], i)}
                    self._keep(i, [document for key, document in new.items() if key not in seen])
                    seen |= {*new}
                self._end(len(batches))
        except OSError as error:
            raise InputError(f"{self} cannot be written: {error.strerror or error}; whole batches are kept") from error

    def __str__(self) -> str:
        return f"folder {str(self.path)!r}"

    @property
    def _file(self) -> Path:
        return self.path / "manifest.json"

    def _manifest(self) -> dict[str, Any] | None:
        if not self._file.exists():
            return None
        check_is_no_link(self._file)
        found = ROLLOUTS.read(read_json(self._file, RolloutsManifest), str(self._file))
        mine, theirs = (dict(flatten(one)) for one in (self.recipe, found))
        for field in mine:
            if mine[field] != theirs.get(field):
                raise InputError(
                    f"{self} holds other rollouts: {field} is {theirs.get(field)!r} there and {mine[field]!r} here; "
                    "name another folder"
                )
        return found

    def _begin(self) -> None:
        files = {*self.path.iterdir()} - {self.path / "lock"}
        for leftover in filter(is_temporary, files):
            remove(leftover)
        if self._manifest() is not None:
            return
        foreign = [file.name for file in files if not is_temporary(file)]
        if foreign:
            raise InputError(f"{self} holds other files ({min(foreign)}); name an empty folder or a new one")
        self._end(None)

    def _end(self, n_batches: int | None) -> None:
        write_json(self._file, {**ROLLOUTS.stamp(), **self.recipe, "n_batches": n_batches})

    def _batches(self) -> list[list[Document]]:
        """Of every batch that is there its texts, in order."""
        found: list[list[Document]] = []
        for path in sorted(self.path.glob("rollouts-*.jsonl")):
            check_is_no_link(path)
            match, content = _BATCH.fullmatch(path.name), path.read_bytes()
            if match is None or int(match[1]) != len(found) or match[2] != f"{zlib.crc32(content):08x}":
                raise InputError(f"{self}: {path.name} is damaged, or a batch before it is missing; remove the folder")
            rows = [json.loads(line) for line in content.splitlines()]
            found.append([next(iter(row.values())) for row in rows])
        return found

    def _keep(self, index: int, documents: Sequence[Document]) -> None:
        content = b"".join(json.dumps({_column(one): one}).encode() + b"\n" for one in documents)
        write_parts(self.path / f"rollouts-{index:06d}-{zlib.crc32(content):08x}.jsonl", [content])


def wrap_rollouts(documents: list[Document], rules: Rollouts) -> DocumentSource:
    """Rollouts as a source of documents. Raises InputError where there are none."""
    model = rules.model if isinstance(rules.model, str) else rules.model.short_name()
    return wrap_documents(documents, name=f"rollouts of {model}")


def _column(document: Document) -> str:
    if isinstance(document, str):
        return "text"
    return "messages" if isinstance(document[0], dict) else "input_ids"


@dataclass(frozen=True)
class _Prompt:
    """A prompt, its token ids, and how many of these no text shows (a BOS)."""

    content: Document
    ids: list[int]
    n_hidden: int
    opening: str
    """what the template has begun the answer with, and the answer keeps"""


class _Writer:
    """A language model that answers prompts, a batch at a time."""

    def __init__(self, lm: LanguageModel, rules: Rollouts) -> None:
        self._lm, self._rules, self._tokenizer = lm, rules, lm.tokenizer
        self._ends = stop_ids(lm)

    def batches(self, prompts: DocumentSource) -> list[list[_Prompt]]:
        """The prompts that are used, in their order: each once, and none that leaves no room for an answer."""
        limit, found, n_long = self._lm.max_sequence_length, list[_Prompt](), 0
        for content in _each_once(prompts, self._rules.n_prompts):
            prompt = self._encode(content)
            if limit is not None and len(prompt.ids) + self._rules.max_new_tokens > limit:
                n_long += 1
            elif prompt.ids:
                found.append(prompt)
        if n_long:
            log.warning("%d prompts leave no room for %d new tokens", n_long, self._rules.max_new_tokens)
        if not found:
            raise InputError(f"prompts: {prompts.name!r} has none that can be used ({n_long} are too long)")
        size = self._rules.batch_size
        return [found[first : first + size] for first in range(0, len(found), size)]

    def _encode(self, content: Document) -> _Prompt:
        most, tokenizer = self._rules.prompt_tokens, self._tokenizer
        if not isinstance(content, str) and not isinstance(content[0], dict):
            return _Prompt(content, list(content[:most]), 0, "")  # pyright: ignore[reportArgumentType]
        if isinstance(content, str) and tokenizer.bos_token_id is None and not _ids_of(tokenizer, content):
            return _Prompt(content, [], 0, "")
        ids = prompt_ids(tokenizer, content, bos=True, to_answer=True, max_length=None)  # pyright: ignore[reportArgumentType]
        n_hidden = int(ids[0] == tokenizer.bos_token_id)
        if isinstance(content, str):
            return _Prompt(content, ids[: most + n_hidden], n_hidden, "")
        opening = _OPEN_THINKING.search(chat_text(tokenizer, content, to_answer=True))  # pyright: ignore[reportArgumentType]
        return _Prompt(content, ids, n_hidden, "" if opening is None else opening[0])

    @torch.no_grad()
    def write(self, prompts: Sequence[_Prompt], index: int) -> list[Document]:
        """What comes of each prompt; nothing of one that is not answered."""
        from transformers import GenerationConfig

        lm, sampling = self._lm, self._rules.sampling
        S = max(len(prompt.ids) for prompt in prompts)
        ids_NS = torch.full((len(prompts), S), self._ends[0] if self._ends else 0)
        mask_NS = torch.zeros_like(ids_NS)
        for n, prompt in enumerate(prompts):
            ids_NS[n, S - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask_NS[n, S - len(prompt.ids) :] = 1
        drawn = {"do_sample": True, **sampling.model_dump()} if sampling.temperature else {"do_sample": False}
        config = GenerationConfig(
            max_new_tokens=self._rules.max_new_tokens,
            eos_token_id=self._ends or None,
            pad_token_id=self._ends[0] if self._ends else 0,
            **drawn,
        )
        devices = [lm.device] if lm.device.type == "cuda" else []
        with lm.lock, torch.random.fork_rng(devices=devices), _instead_of_its_own(lm.model, config):
            torch.manual_seed(derived_seed(self._rules.seed, index))
            made = lm.model.generate(input_ids=ids_NS.to(lm.device), attention_mask=mask_NS.to(lm.device))
        answers = [self._until_end(row[S:]) for row in made.tolist()]
        return [self._document(prompt, ids) for prompt, ids in zip(prompts, answers, strict=True) if ids]

    def _until_end(self, ids: list[int]) -> list[int]:
        return ids[: next((at for at, token in enumerate(ids) if token in self._ends), len(ids))]

    def _document(self, prompt: _Prompt, answer: list[int]) -> Document:
        content = prompt.content
        if isinstance(content, str):
            return self._decode([*prompt.ids[prompt.n_hidden :], *answer])
        if not isinstance(content[0], dict):
            return [*prompt.ids, *answer]
        return [*content, {"role": "assistant", "content": prompt.opening + self._decode(answer)}]  # pyright: ignore[reportReturnType]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@contextmanager
def _instead_of_its_own(model: Any, config: Any) -> Iterator[None]:
    """`generate` fills what a config leaves open from the model's own."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def _each_once(prompts: DocumentSource, n: int | None) -> Iterator[Document]:
    """The first `n` different prompts: of a chat all up to what the assistant would answer."""
    seen: set[str] = set()
    for document in prompts.open():
        if n is not None and len(seen) >= n:
            return
        if len(document) and isinstance(document[0], dict):
            asked = [i for i, message in enumerate(document) if dict(message).get("role") != "assistant"]  # pyright: ignore
            document = document[: asked[-1] + 1] if asked else []
        key = hash_documents([document])
        if len(document) and key not in seen:
            seen.add(key)
            yield document


def _ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def stop_ids(lm: LanguageModel) -> list[int]:
    """Token ids that end what a model writes: its own, its tokenizer's, and the one with which its chat template ends what
    the assistant says (a base under an adapter may not know it)."""
    own = getattr(getattr(lm.model, "generation_config", None), "eos_token_id", None)
    found = [*(own if isinstance(own, list) else [own]), getattr(lm.tokenizer, "eos_token_id", None)]
    if getattr(lm.tokenizer, "chat_template", None) is not None:
        try:
            chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _END}]
            after = chat_text(lm.tokenizer, chat).rpartition(_END)[2]
        except InputError:
            after = ""
        first = _ids_of(lm.tokenizer, after)[:1]
        found += [token for token in first if token in lm.tokenizer.added_tokens_decoder]
    return [token for token in dict.fromkeys(found) if token is not None]
