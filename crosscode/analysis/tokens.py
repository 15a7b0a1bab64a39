"""Token ids as a reader wants to see them."""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's sign for a space."""
_WORD_END = "</w>"
_BEYOND_ASCII = "é你"


@dataclass(frozen=True)
class DisplayToken:
    """One token, or several that only together make a character.

    Attributes:
        text: what to show; line breaks and tabs as visible signs, bytes that are no character as `\\xNN`.
        strength: largest activation over its tokens.
        is_peak: whether it holds the example's peak.
        is_special: a token outside the text, such as BOS.
    """

    text: str
    strength: float
    is_peak: bool
    is_special: bool


class TokenDisplay:
    """Shows token ids of a `transformers` tokenizer; without one (None) the numbers themselves.

    Works on the tokenizer's pieces and never on a decoded text, as decoding may merge or drop spaces. Pieces that are
    bytes are put together before they are decoded: a character whose bytes are spread over tokens is shown once, whole.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._special_ids = frozenset(getattr(tokenizer, "all_special_ids", ()))
        added = getattr(tokenizer, "added_tokens_decoder", None) or {}
        self._added = {token_id: str(token) for token_id, token in added.items() if token_id not in self._special_ids}
        self._kind = "none" if tokenizer is None else _kind_of(tokenizer)

    def __call__(self, token_ids: Sequence[int], strengths: Sequence[float], peak: int = -1) -> list[DisplayToken]:
        """Tokens with their strengths; `peak` is the index of the peak, -1 for none."""
        shown: list[DisplayToken] = []
        pending, strength, is_peak = b"", 0.0, False
        for i, (token_id, value) in enumerate(zip(token_ids, strengths, strict=True)):
            piece = self.piece(int(token_id))
            if isinstance(piece, str) and pending:
                shown.append(DisplayToken(_visible(pending), strength, is_peak, False))
                pending, strength, is_peak = b"", 0.0, False
            if isinstance(piece, str):
                is_special = int(token_id) in self._special_ids
                shown.append(DisplayToken(_visible(piece.encode()), value, i == peak, is_special))
                continue
            pending, strength, is_peak = pending + piece, max(strength, value), is_peak or i == peak
            if not _is_incomplete(pending):
                shown.append(DisplayToken(_visible(pending), strength, is_peak, False))
                pending, strength, is_peak = b"", 0.0, False
        if pending:
            shown.append(DisplayToken(_visible(pending), strength, is_peak, False))
        return shown

    def text(self, token_id: int) -> str:
        """One token by itself."""
        return self([token_id], [0.0])[0].text

    def piece(self, token_id: int) -> bytes | str:
        """The bytes that a token stands for; its text where it is not made of bytes (special tokens, unknown ids)."""
        piece = None if self._tokenizer is None else self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:
            return f"[{token_id}]"
        if token_id in self._special_ids:
            return piece
        if token_id in self._added and self._kind != "words":
            return self._added[token_id].encode()
        byte = _BYTE_PIECE.fullmatch(piece)
        if byte:
            return bytes([int(byte[1], 16)])
        if self._kind == "byte-level":
            table = _bytes_of_characters()
            return bytes(table[c] for c in piece) if all(c in table for c in piece) else piece
        if self._kind == "bytes":
            return piece.encode("latin-1") if max(piece, default="") <= "\xff" else piece
        if self._kind == "words":
            return piece.removeprefix("##") if piece.startswith("##") else f" {piece}"
        if piece.endswith(_WORD_END):
            return f"{piece.removesuffix(_WORD_END)} ".encode()
        return piece.replace(_SPACE, " ").encode()


def _kind_of(tokenizer: Any) -> str:
    """What pieces are made of: GPT-2's alphabet ("byte-level"), a character for each byte ("bytes"), text that says where
    spaces are ("text"), or whole words that do not ("words")."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = "" if backend is None else repr(backend.decoder) + repr(backend.pre_tokenizer)
    if "ByteLevel" in parts or hasattr(tokenizer, "byte_decoder"):
        return "byte-level"
    special = {*getattr(tokenizer, "all_special_tokens", ())}
    pieces = [piece for piece in tokenizer.get_vocab() if piece not in special]
    if any(_SPACE in piece or piece.endswith(_WORD_END) for piece in pieces):
        return "text"
    can_encode = callable(tokenizer)
    if not can_encode or any(piece.startswith("##") for piece in pieces):
        return "words"

    def pieces_of(text: str) -> str:
        return "".join(
            map(str, tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"]))
        )

    if pieces_of(_BEYOND_ASCII) == _BEYOND_ASCII.encode().decode("latin-1"):
        return "bytes"
    texts = [one + two for one, two in itertools.pairwise(pieces[:: max(1, len(pieces) // 64)])]
    n_joined = sum(pieces_of(text) == text for text in texts)
    return "text" if n_joined > len(texts) / 2 else "words"


@cache
def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for characters from U+0100 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _is_incomplete(data: bytes) -> bool:
    """Whether the bytes end inside a character that a further token may complete."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    return bool(decoder.getstate()[0])


def _visible(data: bytes) -> str:
    """Text in which everything can be seen; bytes that are no character as `\\xNN`."""
    text = data.decode("utf-8", errors="backslashreplace")
    text = text.replace("\r", "␍").replace("\n", "↵").replace("\t", "→")
    return "".join(c if c.isprintable() or c == " " else f"\\u{ord(c):04x}" for c in text)
