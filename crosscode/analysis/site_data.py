"""What the explorer's pages read: scripts that each hand one value to the page, so that a page from disk may load them.

`table.js` has the columns of all latents, `texts.js` the tokens, `records-N.js` the records of some latents each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from crosscode.analysis.example_pool import Example
from crosscode.analysis.latents_frame import latents_frame
from crosscode.analysis.latents_pass import LatentsPass
from crosscode.analysis.records import LatentRecords, LogitEnds, OtherText
from crosscode.analysis.tokens import TokenDisplay
from crosscode.analysis.wording import distinct_labels

RECORDS_PER_FILE = 256
N_BINS_SHOWN = 32
_N_SEARCHED = 5


def scripts(
    study: LatentsPass, records: LatentRecords, tokenizer: Any, tokenizers: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[tuple[str, str]]:
    """Names and texts of the files. `tokenizers`: as of `HeldoutText`."""
    vocabulary = _Vocabulary(TokenDisplay(tokenizer))
    texts = [[vocabulary.number(token) for token in sequence.tolist()] for sequence in records.texts.sequences]
    others = [_Other(one) for one in records.texts.in_others(tokenizers)]
    search: list[str] = []
    n_latents = study.decoder_norm_LX.shape[0]
    for start in range(0, n_latents, RECORDS_PER_FILE):
        some = range(start, min(start + RECORDS_PER_FILE, n_latents))
        found = [_record(study, records, vocabulary, latent) for latent in some]
        search.extend(_searched(study, records, vocabulary, others, latent) for latent in some)
        yield f"records-{start // RECORDS_PER_FILE}", _script(f"records-{start // RECORDS_PER_FILE}", found)
    of_others = [one.script() for one in others]
    found = {"pieces": vocabulary.pieces, "texts": texts, "names": [*tokenizers], "others": of_others}
    yield "texts", _script("texts", found)
    frame = latents_frame(study)
    columns = [{"name": name, "values": [_short(v) for v in frame[name].tolist()]} for name in frame.columns]
    shown = {"columns": columns, "search": search, "perFile": RECORDS_PER_FILE, "readers": list(study.readers)}
    yield "table", _script("table", shown)


class _Vocabulary:
    """Numbers the tokens that occur, each with its text; bytes that are no character by themselves as a list."""

    def __init__(self, display: TokenDisplay):
        self._display = display
        self._numbers: dict[int, int] = {}
        self._texts: dict[int, str] = {}
        self.pieces: list[str | list[int]] = []

    def number(self, token: int) -> int:
        if token not in self._numbers:
            piece = self._display.piece(token)
            self._numbers[token] = len(self.pieces)
            self.pieces.append(self.text(token) if isinstance(piece, str) or _is_text(piece) else list(piece))
        return self._numbers[token]

    def text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._display.text(token)
        return self._texts[token]


class _Other:
    """The text in another tokenizer's tokens, as scripts have it."""

    def __init__(self, text: OtherText):
        self._text, self._vocabulary = text, _Vocabulary(text.display)

    def at(self, example: Example) -> str:
        """The token at an example's peak."""
        return self._vocabulary.text(self._text.at(example))

    def script(self) -> dict[str, Any]:
        texts = [[self._vocabulary.number(token) for token in tokens_T.tolist()] for tokens_T, _ in self._text.rows]
        places = [place_S.tolist() for _, place_S in self._text.rows]
        return {"pieces": self._vocabulary.pieces, "texts": texts, "places": places}


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _record(study: LatentsPass, records: LatentRecords, vocabulary: _Vocabulary, latent: int) -> dict[str, Any]:
    """One latent. Examples are `[sequence, position, at, value, ..., at, value, ...]`, places relative to the position; behind a
    value stands what is read from each of the readers."""
    histogram, upper = _histogram(records, latent)
    labels = distinct_labels(study.position_names)
    return {
        "examples": [[_example(one) for one in some] for some in study.examples(latent).values()],
        "histogram": histogram,
        "upper": upper,
        "logits": {
            labels[name]: [_ends(ends, vocabulary, latent, top=top) for top in (True, False)]
            for name, ends in records.logits.items()
            if bool(ends.writes_L[latent])
        },
        "byDecoder": [[other, _short(value)] for other, value in records.by_decoder.of(latent)],
        "byFiring": [[other, _short(value)] for other, value in records.by_firing.of(latent)],
    }


def _example(example: Example) -> list[float | None]:
    found: list[float | None] = [example.sequence, example.position]
    for at, strength in enumerate(example.strengths):
        if strength > 0:
            found += [
                at - example.peak,
                *(_short(one, 3) for one in (strength, *(example.read[at] if example.read else ()))),
            ]
    return found


def _histogram(records: LatentRecords, latent: int) -> tuple[list[int], float | None]:
    """Half as many bins, without the empty ones at the end, and the upper edge of the last."""
    counts_N = records.histograms.counts_LN[latent].reshape(N_BINS_SHOWN, -1).sum(1)
    n_used = max((i + 1 for i, count in enumerate(counts_N.tolist()) if count), default=0)
    return counts_N[:n_used].tolist(), _short(float(records.histograms.upper_L[latent]) * n_used / N_BINS_SHOWN)


def _ends(ends: LogitEnds, vocabulary: _Vocabulary, latent: int, *, top: bool) -> list[list[Any]]:
    ids, values = (ends.top_id_LE, ends.top_LE) if top else (ends.bottom_id_LE, ends.bottom_LE)
    pairs = zip(ids[latent].tolist(), values[latent].tolist(), strict=True)
    return [[(ends.display or vocabulary).text(token), _short(value, 3)] for token, value in pairs]


def _searched(
    study: LatentsPass, records: LatentRecords, vocabulary: _Vocabulary, others: Sequence[_Other], latent: int
) -> str:
    """Tokens at which it is largest, and those that it makes more likely."""
    largest = study.top.examples(latent)[:_N_SEARCHED]
    found = [vocabulary.text(one.tokens[one.peak]) for one in largest]
    found += [other.at(one) for other in others for one in largest]
    for ends in records.logits.values():
        if bool(ends.writes_L[latent]):
            text = (ends.display or vocabulary).text
            found += [text(token) for token in ends.top_id_LE[latent, :_N_SEARCHED].tolist()]
    return " ".join(dict.fromkeys(text.strip() for text in found))


def _short(value: Any, digits: int = 4) -> Any:
    """Undefined numbers as None."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _script(name: str, value: Sequence[Any] | dict[str, Any]) -> str:
    return f"crosscodeData({json.dumps(name)},{json.dumps(value, separators=(',', ':'), allow_nan=False)});\n"
