"""Text that every CPython installation carries, as in-memory datasets.

Two domains:

- `code`: the standard library's sources, without tests, generated tables and very large files;
- `manual`: the reference prose behind `help()`, reStructuredText made by Sphinx (`pydoc_data.topics`), which the base
  model has not seen.

A document's split hangs on a hash of its name (path below the standard library, or topic), so it is the same on every
machine and for every Python version that has the document.
"""

import ast
import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from crosscode.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

Split = Literal["train", "heldout"]
Domain = Literal["code", "manual"]

HELDOUT_ONE_IN = 8
MIN_CHARACTERS = 200
MAX_CHARACTERS = 150_000
# A shorter paragraph (a heading, "See also:") may recur without giving anything away.
MIN_CHARACTERS_OF_A_REPEAT = 60

_TEST_FOLDERS = {"test", "tests", "idle_test"}
_EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "encodings", "pydoc_data", "lib-dynload", "__pycache__"}
_EXCLUDED_FILES = {"html/entities.py", "msilib/schema.py", "msilib/sequence.py", "stringprep.py", "lib2to3/pygram.py"}
_EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")


class Document(NamedTuple):
    """One text with the domain it belongs to and a name that does not depend on where Python is installed."""

    text: str
    domain: Domain
    path: str


def document_hash(domain: Domain, path: str) -> int:
    """64 bits of a hash that orders documents and splits them, from the name alone."""
    return int.from_bytes(hashlib.sha256(f"demo/{domain}/{path}".encode()).digest()[:8], "big")


def document_split(domain: Domain, path: str) -> Split:
    """The split that a document belongs to: one in `HELDOUT_ONE_IN` is held out."""
    return "heldout" if document_hash(domain, path) % HELDOUT_ONE_IN == 0 else "train"


def code_documents(stdlib: Path, include_tests: bool = False) -> Iterator[Document]:
    """Sources below `stdlib` that are prose-like code: decodable, neither tiny nor huge, no generated tables.

    Args:
        stdlib: folder of the standard library.
        include_tests: also the test suite's sources. Some distributions leave them out, so only the training of the
            language models asks for them.
    """
    excluded = _EXCLUDED_FOLDERS if include_tests else _EXCLUDED_FOLDERS | _TEST_FOLDERS
    for folder, subfolders, names in os.walk(stdlib):
        # In place, so that the walk does not enter site-packages, which may hold 100,000 files.
        subfolders[:] = sorted(set(subfolders) - excluded)
        for name in sorted(names):
            file = Path(folder, name)
            path = file.relative_to(stdlib).as_posix()
            if file.suffix != ".py" or path in _EXCLUDED_FILES or path.startswith(_EXCLUDED_PREFIXES):
                continue
            text = _read_source(file)
            if text is not None and MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
                yield Document(text, "code", path)


def _read_source(file: Path) -> str | None:
    """The file's text, or None where it is no valid source (the test suite holds such files on purpose)."""
    try:
        with tokenize.open(file) as stream:
            text = stream.read()
    except (SyntaxError, UnicodeError, OSError):
        return None
    return None if "\0" in text else text


def manual_documents(stdlib: Path) -> list[Document]:
    """The manual's topics. Topics quote each other: each repeated paragraph is kept once, a held-out topic first.

    So no paragraph of a held-out topic is in a training topic.
    """
    topics = _read_topics(stdlib / "pydoc_data" / "topics.py")
    by_precedence = sorted(
        topics, key=lambda name: (document_split("manual", name) == "train", -len(topics[name]), name)
    )
    seen: set[str] = set()
    documents = []
    for name in by_precedence:
        paragraphs = [paragraph for paragraph in topics[name].split("\n\n") if _is_new(paragraph, seen)]
        text = "\n\n".join(paragraphs)
        if len(text) >= MIN_CHARACTERS:
            documents.append(Document(text, "manual", name))
    return documents


def _is_new(paragraph: str, seen: set[str]) -> bool:
    """Whether a paragraph is not among `seen`, layout aside; adds it."""
    normal = " ".join(paragraph.split())
    if len(normal) < MIN_CHARACTERS_OF_A_REPEAT:
        return True
    if normal in seen:
        return False
    seen.add(normal)
    return True


def _read_topics(file: Path) -> dict[str, str]:
    """The dictionary literal that `file` assigns to `topics`, read without running the file."""
    if not file.is_file():
        raise InputError(f"domains: 'manual' needs {file}, which this Python installation lacks; use domains=('code',)")
    with tokenize.open(file) as stream:
        tree = ast.parse(stream.read())
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            return ast.literal_eval(statement.value)
    raise InputError(f"domains: 'manual' found no dictionary of topics in {file}; use domains=('code',)")


def demo_documents(
    split: Split,
    domains: Sequence[Domain] = ("code", "manual"),
    include_tests: bool = False,
    stdlib: Path | None = None,
) -> list[Document]:
    """The documents of one split, in an order that looks random, mixes the domains and is always the same.

    Args:
        split: "train" or "heldout".
        domains: which of "code" and "manual".
        include_tests: with the test suite's sources, where they are installed.
        stdlib: the standard library to read; that of the running Python by default.

    Raises:
        InputError: unknown split or domain, a split without documents, or sources that are not installed.
    """
    if split not in get_args(Split):
        raise InputError(f"split: {split!r} must be one of {', '.join(get_args(Split))}")
    if not domains or isinstance(domains, str) or not set(domains) <= set(get_args(Domain)):
        raise InputError(f"domains: {domains!r} must be a non-empty sequence out of {', '.join(get_args(Domain))}")
    stdlib = stdlib or Path(sysconfig.get_paths()["stdlib"])
    chosen: list[Document] = []
    for domain in dict.fromkeys(domains):
        documents = code_documents(stdlib, include_tests) if domain == "code" else manual_documents(stdlib)
        kept = [doc for doc in documents if document_split(doc.domain, doc.path) == split]
        if not kept:
            raise InputError(f"domains: {domain!r} has no document in split {split!r} of {stdlib}")
        chosen.extend(kept)
    return sorted(chosen, key=lambda doc: document_hash(doc.domain, doc.path))


def as_dataset(documents: Sequence[Document]) -> "Dataset":
    """With the columns `text`, `domain` and `path`."""
    from datasets import Dataset  # slow to import, and most of this module does without

    return Dataset.from_list([document._asdict() for document in documents])
