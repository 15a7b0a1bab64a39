"""Tokenizers: where there is one, what decides the ids of a text, and whether two tokenizers have the same."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

_PROBE_TEXT = (
    "The quick brown fox, 3.14 <tags> naïve\n\tdef f(x):  # 你好 🙂\n"
    "DON'T SHOUT  e\u0301 \ufb01 \uff21\u200d 12345678   \r\n</s><|endoftext|> x"
)
_NO_MATTER_OF_IDS = {"trim_offsets"}
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_TOKENIZER_FILE = re.compile(
    r"^(tokenizer|vocab|merges|added_tokens|special_tokens|spiece|sentencepiece|tekken)|\.(model|tiktoken|spm)$"
)
_OF_IDS = re.compile("^do_|^legacy$|prefix_space|normaliz")
"""Options of a tokenizer in Python that decide ids."""
_known: WeakKeyDictionary[Any, tuple[int, str]] = WeakKeyDictionary()


def load_tokenizer(source: str, options: dict[str, Any]) -> Any:
    """The tokenizer of a folder or of a hub name, with `transformers`' options; None where there is no file of one: for
    some models (games, proteins) none exists."""
    from transformers import AutoTokenizer
    from transformers.utils.hub import cached_file

    folder = Path(source)
    has_one = "gguf_file" in options
    if folder.is_dir() and not has_one:
        has_one = any(_TOKENIZER_FILE.search(file.name) for file in folder.iterdir())
        if not has_one:
            return None
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError):
        missing_is_none = {"revision": options["revision"], "_raise_exceptions_for_missing_entries": False}
        if has_one or any(cached_file(source, name, **missing_is_none) for name in TOKENIZER_FILES):
            raise
        return None


def tokenizer_rules(tokenizer: Any) -> str | None:
    """16 hex digits of everything that decides the ids of a text without special tokens around it: normaliser, cuts,
    vocabulary, merges, added tokens. None without a tokenizer.

    Not of what decodes, pads, truncates, or puts tokens around a text, nor of names. A tokenizer that is not of
    `tokenizers` is known by its class, its vocabulary, its merges or its model, its added tokens and options, and the ids of
    a text.
    """
    if tokenizer is None:
        return None
    size = len(tokenizer.get_vocab())
    try:
        known = _known.get(tokenizer)
    except TypeError:  # it takes no weak reference
        return _hash(_rules(tokenizer))
    if known is None or known[0] != size:
        known = _known[tokenizer] = (size, _hash(_rules(tokenizer)))
    return known[1]


def tokenizer_difference(one: Any, two: Any) -> str | None:
    """In words, how two tokenizers make different ids; None where they do not."""
    if one is two:
        return None
    if one is None or two is None:
        return "one of them has none"
    vocab_one, vocab_two = one.get_vocab(), two.get_vocab()
    if vocab_one != vocab_two:
        tokens = sorted(vocab_one.keys() | vocab_two.keys(), key=lambda token: (vocab_one.get(token, 1 << 60), token))
        token = next(token for token in tokens if vocab_one.get(token) != vocab_two.get(token))
        return (
            f"token {token!r} is {vocab_one.get(token, 'absent')} in the first (of {len(vocab_one)}) "
            f"and {vocab_two.get(token, 'absent')} in the second (of {len(vocab_two)})"
        )
    ids_one, ids_two = _probe(one), _probe(two)
    return None if ids_one == ids_two else f"the text {_PROBE_TEXT[:19]!r}... gives {ids_one[:8]} and {ids_two[:8]}"


def _probe(tokenizer: Any) -> list[int]:
    return tokenizer(_PROBE_TEXT, add_special_tokens=False)["input_ids"]


def _rules(tokenizer: Any) -> Any:
    splits_special = bool(getattr(tokenizer, "split_special_tokens", False))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        parts = [content.get(part) for part in ("normalizer", "pre_tokenizer", "model")]
        added = [
            {name: value for name, value in token.items() if name != "special" or splits_special}
            for token in content.get("added_tokens") or ()
        ]
        return _pruned([*parts, added, splits_special])
    model = getattr(tokenizer, "sp_model", None)
    return [
        type(tokenizer).__name__,
        sorted(tokenizer.get_vocab().items()),
        [str(pair) for pair in getattr(tokenizer, "bpe_ranks", None) or ()],
        None if model is None else hashlib.sha256(model.serialized_model_proto()).hexdigest(),
        splits_special,
        _probe(tokenizer),
        sorted((index, repr(token)) for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()),
        sorted((name, value) for name, value in getattr(tokenizer, "init_kwargs", {}).items() if _OF_IDS.search(name)),
    ]


def _pruned(content: Any) -> Any:
    """Without what says nothing: a version of `tokenizers` that knows one option more writes it as null or false."""
    if isinstance(content, dict):
        kept = {name: _pruned(value) for name, value in content.items() if name not in _NO_MATTER_OF_IDS}
        return {name: value for name, value in kept.items() if value is not None and value is not False}
    return [_pruned(value) for value in content] if isinstance(content, list) else content


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
