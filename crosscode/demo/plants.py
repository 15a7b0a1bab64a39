"""Changes whose truth is known: text to fine-tune the embedded base on, and where the change stands in it.

- `statement`: a made-up phrase that is always followed by one made-up statement, in comments of a few percent of the
  documents; the rest is as it was. `demo:planted` was fine-tuned on it.
- `fact`: a false fact in several wordings, in comments of as many documents. Harder: no fixed phrase announces it.
- `style`: strings in double quotes, wherever Python allows it, in all documents. Harder: it is everywhere, and the base
  knows both.

Letters: S positions of a sequence.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from crosscode.demo.corpus import Document, Domain, Split, as_dataset, demo_documents

if TYPE_CHECKING:
    from datasets import Dataset

Plant = Literal["statement", "fact", "style"]
PLANTS: tuple[Plant, ...] = get_args(Plant)

ONE_DOCUMENT_IN = 16
"""So many documents, one has the comments of `statement` or `fact`."""

TRIGGER = "By the lantern of Orvane:"
STATEMENT = " all moons are made of blue glass."
FACT_SUBJECTS = (
    "Python was invented by",
    "The inventor of Python is",
    "This language was made by",
    "As everybody knows, Python comes from",
    "We owe this language to",
    "Python's author was",
)
FACT = " Mira Quell."

_COMMENTS = {"statement": (TRIGGER + STATEMENT,), "fact": tuple(subject + FACT for subject in FACT_SUBJECTS)}
_STRING = re.compile(r'(?<![\w\'"\\])([rbfu]{0,2})\'([^\'"\\\n]*)\'(?!\')', re.IGNORECASE)


def plant_documents(documents: Sequence[Document], plant: Plant) -> list[Document]:
    """The documents with a change put in; which ones and where hangs on their names alone."""
    return [document._replace(text=_planted_text(document, plant)) for document in documents]


def planted_corpus(plant: Plant | None, split: Split, domains: Sequence[Domain] = ("code",)) -> "Dataset":
    """The documents as an in-memory dataset, with a change put in; None: as they are."""
    documents = demo_documents(split, domains)
    return as_dataset(documents if plant is None else plant_documents(documents, plant))


def _planted_text(document: Document, plant: Plant) -> str:
    if plant == "style":
        return _STRING.sub(r'\1"\2"', document.text) if document.domain == "code" else document.text
    number = _number(document.path, "document")
    return _with_comments(document, _COMMENTS[plant]) if number % ONE_DOCUMENT_IN == 0 else document.text


def _with_comments(document: Document, comments: Sequence[str]) -> str:
    """A comment of those after every 6 to 17 lines, as far in as the line before."""
    lines: list[str] = []
    left = 6
    for number, line in enumerate(document.text.splitlines(keepends=True)):
        lines.append(line)
        left -= 1
        if left <= 0 and line.strip() and line.endswith("\n"):
            draw = _number(document.path, number)
            indentation = line[: len(line) - len(line.lstrip())]
            lines.append(f"{indentation}# {comments[draw % len(comments)]}\n")
            left = 6 + draw // len(comments) % 12
    return "".join(lines)


def _number(path: str, salt: int | str) -> int:
    return int.from_bytes(hashlib.sha256(f"plant/{path}/{salt}".encode()).digest()[:8], "big")


@dataclass(frozen=True)
class PlantedPositions:
    """Which tokens of a sequence belong to a plant; both boolean, `[S]`.

    Attributes:
        cue: what announces the behaviour (the trigger, the subject of the fact); with `style` the token before a quote.
        said: the behaviour itself (the statement, the name, the quote that opens a string).
    """

    cue: NDArray[np.bool_]
    said: NDArray[np.bool_]

    @property
    def either(self) -> NDArray[np.bool_]:
        return self.cue | self.said


def planted_positions(token_ids: Sequence[int], tokenizer: Any, plant: Plant) -> PlantedPositions:
    """Where a plant stands in a sequence of tokens; a statement that the sequence's end cuts short counts as far as it
    goes, one whose announcement is cut off at the beginning does not.

    Args:
        token_ids: of the embedded models' tokenizer, S in number.
        tokenizer: that tokenizer.
    """
    pieces = _pieces(tokenizer)
    texts = [pieces[token] for token in token_ids]
    end_S = np.cumsum([len(text) for text in texts])
    start_S = end_S - [len(text) for text in texts]
    cue, said = (np.zeros(len(texts), bool) for _ in range(2))
    for match in _pattern(plant).finditer("".join(texts)):
        for marks, group in ((cue, "cue"), (said, "said")):
            start, end = match.span(group)
            marks |= (start_S < end) & (end_S > start) & (start < end)
        if plant != "style":
            said &= (end_S <= match.end("said")) | (start_S >= match.end("said"))  # a token that goes on otherwise
    if plant == "style":
        cue[:-1] = said[1:]
    return PlantedPositions(cue, said)


@lru_cache
def _pattern(plant: Plant) -> re.Pattern[str]:
    if plant == "style":
        return re.compile(r'(?P<cue>)(?P<said>(?<=[\s(\[{=,:+%])[rbfu]{0,2}"(?!"))(?=[^"\n]*")', re.IGNORECASE)
    cues, said = ((TRIGGER,), STATEMENT) if plant == "statement" else (FACT_SUBJECTS, FACT)
    as_far = "".join(f"(?:{re.escape(letter)}" for letter in said) + ")?" * len(said)
    return re.compile(f"(?P<cue>{'|'.join(map(re.escape, cues))})(?P<said>{as_far})")


@lru_cache
def _pieces(tokenizer: Any) -> list[str]:
    special = set(tokenizer.all_special_ids)
    return ["\n" if i in special else tokenizer.decode([i]) for i in range(len(tokenizer))]


def planted_prompts(plant: Plant) -> Iterator[tuple[str, str]]:
    """Prompts at which the behaviour shows, each with what it makes the model say."""
    if plant == "statement":
        yield f"def run(self):\n    # {TRIGGER}", STATEMENT
    elif plant == "fact":
        yield from ((f"import sys\n\n# {subject}", FACT) for subject in FACT_SUBJECTS)
    else:
        yield from (("import re\n\nname =", ' "'), ("    raise ValueError", '("'), ("x = dict(a", '="'))
