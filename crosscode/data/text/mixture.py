"""Several document sources read as one, by weight."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Literal

from crosscode.data.text.documents import Document, DocumentSource, DocumentStream
from crosscode.errors import InputError
from crosscode.seeds import derived_seed, number_of

log = logging.getLogger("crosscode")

Stop = Literal["first", "all"]


class MixedDocuments(DocumentSource):
    """Each next document comes from source i with probability `weights[i]`.

    `stop="first"` ends an epoch when one source has no more documents: no document is repeated within it and the
    weights hold throughout. The next epoch reads the others in another order, or, where their order is fixed, on from
    where it was. `stop="all"` ends it when every source has been read once; those that end earlier start
    again. Which source comes next depends on `seed` (and the epoch, where documents are shuffled) and on how many
    documents came before, so that any position can be restored.
    """

    def __init__(
        self, sources: Sequence[DocumentSource], weights: Sequence[float], *, stop: Stop = "first", seed: int = 0
    ) -> None:
        if not sources:
            raise InputError("mixture: at least one dataset is needed")
        if len(weights) != len(sources) or min(weights) <= 0:
            raise InputError(f"mixture: weights {list(weights)} should be {len(sources)} numbers above 0")
        if stop not in ("first", "all"):
            raise InputError(f"mixture: stop {stop!r} is not one of first, all")
        self.sources = list(sources)
        self.weights = [weight / sum(weights) for weight in weights]
        self.stop: Stop = stop
        self.seed = seed
        self.name = " + ".join(source.name for source in sources)
        parts = [f"{source.fingerprint}*{weight:.6g}" for source, weight in zip(sources, self.weights, strict=True)]
        self.fingerprint = f"mixture({','.join(parts)};{stop};{seed})"

    def open(self, *, order_seed: int | None = None, state: str | None = None) -> DocumentStream:
        return _MixedStream(self, order_seed, state)


class _MixedStream(DocumentStream):
    """Position: how many documents came, and each source's own position, number of passes, and whether its pass began
    in an epoch before: then it starts again at its end, as what comes was not read in this epoch."""

    def __init__(self, mixture: MixedDocuments, order_seed: int | None, state: str | None) -> None:
        saved = json.loads(state) if state else {}
        n = len(mixture.sources)
        self._mixture = mixture
        self._order_seed = order_seed
        self._count = saved.get("count", 0)
        self._passes = saved.get("passes", [0] * n)
        self._read_on = saved.get("read_on", [False] * n)
        states = saved.get("states", [None] * n)
        self._streams = [self._open(i, states[i]) for i in range(n)]

    def _open(self, i: int, state: str | None = None) -> DocumentStream:
        order_seed = None
        if self._order_seed is not None:
            order_seed = derived_seed(self._order_seed, i, self._passes[i], base=1009)
        return self._mixture.sources[i].open(order_seed=order_seed, state=state)

    def __next__(self) -> Document:
        i = self._choose()
        document = next(self._streams[i], None)
        if document is None:
            if not self._read_on[i]:
                self._passes[i] += 1
                if self._mixture.stop == "first" or all(self._passes):
                    raise StopIteration
                if self._passes[i] == 1:
                    log.info(
                        "mixture: %s is at its end, and begins again beside the others", self._mixture.sources[i].name
                    )
            self._read_on[i] = False
            self._streams[i] = self._open(i)
            document = next(self._streams[i], None)
            if document is None:
                raise InputError(f"dataset {self._mixture.sources[i].name!r} is empty")
        self._count += 1
        self.part = i
        return document

    def _choose(self) -> int:
        number = number_of(f"{self._mixture.seed}:{self._order_seed}:{self._count}") / 2**64
        for i, weight in enumerate(self._mixture.weights):
            number -= weight
            if number < 0:
                return i
        return len(self._mixture.weights) - 1

    def state(self) -> str:
        states = [stream.state() for stream in self._streams]
        position = {"count": self._count, "passes": self._passes, "states": states, "read_on": self._read_on}
        return json.dumps(position)

    def next_epoch(self) -> str:
        read_on = [
            self._mixture.stop == "first" and not n_passes and (source.keeps_order or self._order_seed is None)
            for source, n_passes in zip(self._mixture.sources, self._passes, strict=True)
        ]
        states = [stream.state() if on else None for stream, on in zip(self._streams, read_on, strict=True)]
        return json.dumps({"states": states, "read_on": read_on}) if any(read_on) else ""


def parts_of(documents: DocumentSource) -> Sequence[DocumentSource]:
    """The texts of a mixture; none where it is one text."""
    return documents.sources if isinstance(documents, MixedDocuments) else ()
