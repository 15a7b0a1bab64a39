"""What files on disk may say: one schema for each kind of JSON that is read back, and the one way to read it.

Fields that a schema does not name pass through: later versions may add some. Versions are `formats`' affair.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from crosscode.errors import InputError, first_line, problem_text

Count = Annotated[int, Field(ge=0, lt=2**63)]
Size = Annotated[int, Field(ge=1, lt=2**63)]
Figures = dict[str, float | None]
_N_SHOWN = 3


class Stored(BaseModel):
    """Base of the schemas. A value is what it says: no text for a number."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


SEAL = "digest"


def seal_of(values: Mapping[str, Any]) -> str:
    """Digest of what a file says, but for the digest itself."""
    text = json.dumps({name: value for name, value in values.items() if name != SEAL}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Sealed(Stored):
    """Figures that are read back: with a digest of all the rest, and the SHA-256 of the weights that they are of."""

    digest: str | None = None
    of_model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_as_written(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get(SEAL) not in (None, seal_of(values)):
            raise ValueError("changed since it was written (its digest is that of other figures)")
        return values


# ---- a run


class FileSums(Stored):
    bytes: Count
    sha256: str


class Checksums(Stored):
    """`checksums.json`"""

    files: dict[str, FileSums]


class Marker(Stored):
    """`.crosscode`"""

    kind: str
    format: int


class GroupFigures(Stored):
    n_tokens: Count
    fvu: float | None = None
    fvu_by_position: Figures
    l0: float | None = None


class Summary(Sealed):
    """`summary.json`"""

    n_metrics: Count | None = None  # lines of metrics.jsonl
    step: Count
    tokens: Count
    fvu: float | None = None
    fvu_by_position: Figures
    l0: float | None
    dead_fraction: float | None
    loss_recovered: Figures | None = None
    groups: dict[str, dict[str, GroupFigures]] | None = None
    without_partner: float | None = None
    tokens_per_s: float | None
    wall_s: float | None = None
    backend: str
    device: str
    versions: dict[str, str] | None = None


class SplicedFigures(Stored):
    n_tokens: Count | None = None
    n_sequences: Count | None = None
    ce_clean: float | None = None
    ce_spliced: float | None = None
    ce_zero: float | None = None
    kl_spliced: float | None = None
    kl_zero: float | None = None
    loss_recovered: float | None = None
    ci95: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)]] | None = None
    groups: dict[str, dict[str, SplicedFigures]] | None = None


class LayeredFigures(Stored):
    ce_clean: float | None = None
    ce: Figures | None = None
    kl: Figures | None = None
    groups: dict[str, dict[str, LayeredFigures]] | None = None


class PrefixFigures(Stored):
    """A nested dictionary alone."""

    n_latents: Size
    fvu: float
    l0: float


class Evaluation(Sealed):
    """`evaluation.json`"""

    fvu: float | None = None
    fvu_by_position: Figures | None = None
    l0: float | None = None
    dead_fraction: float | None = None
    l0_p5: float | None = None
    l0_p95: float | None = None
    l0_train_mode: float | None = None
    density_L: list[float | None] | None = None
    max_activation_L: list[float | None] | None = None
    loss_recovered: dict[str, SplicedFigures] | None = None
    replacement_model: LayeredFigures | None = None
    groups: dict[str, dict[str, GroupFigures]] | None = None
    prefixes: list[PrefixFigures] | None = None
    without_partner: float | None = None


class SweepRow(Stored):
    """One run in `sweep.json`: with `step` it is over, with `error` it failed, with `config` it is not made yet."""

    run: str
    path: str
    id: str | None = None
    config: dict[str, Any] | None = None
    step: Count | None = None
    error: str | None = None
    resumable: bool | None = None
    fvu: float | None = None
    l0: float | None = None
    dead_fraction: float | None = None


class Row(Stored):
    """A line of `histograms.jsonl`, or of `metrics.jsonl`."""

    step: Count


class MetricsRow(Row):
    """A line of `metrics.jsonl`: numbers by name; null where one was not finite."""

    __pydantic_extra__: dict[str, float | None]  # pyright: ignore[reportIncompatibleVariableOverride]
    tokens: Count | None = None


class WandbRun(Stored):
    """`wandb.json`"""

    id: str


class SavedMetrics(Stored):
    n_rows: Count
    last: dict[str, Any]


class TrainerState(Stored):
    """`trainer_state.json`, with its tensors in place."""

    step: Count
    tokens: Count
    seconds: float
    evaluation_due: bool = False
    metrics: SavedMetrics
    optimizer: dict[str, Any]
    firing: dict[str, Any]
    guard: dict[str, Any]
    data: dict[str, Any]
    random: dict[str, Any]


# ---- a model


class Typed(Stored):
    type: str


class ModelSpec(Stored):
    """All that is needed to build a model, but for what is particular to its kind."""

    kind: str
    n_latents: Size
    activation: Typed
    use_encoder_bias: bool
    use_decoder_bias: bool
    linear_skip: bool
    decoder_norm: str | None
    dtype: Literal["float64", "float32", "bfloat16", "float16"]
    is_folded: bool


class SavedLanguageModel(Stored):
    path: str | None = None
    name: str | None = None
    revision: str | None = None
    fingerprint: str | None = None


class Metadata(Stored):
    """What a run says of the activations that its model was trained on."""

    language_models: list[SavedLanguageModel] | None = None
    hookpoints: list[str] | None = None
    output_positions: list[str] | None = None
    architecture: str | None = None
    config: dict[str, Any] | None = None


class SavedModel(Stored):
    """`config.json` of a saved model or checkpoint."""

    format_version: Any
    model: ModelSpec
    metadata: Metadata


# ---- reading


def read_json(path: Path, kind: Any, error: type[InputError] = InputError) -> Any:
    """What a file holds: plain values, as they stand there.

    Args:
        kind: one of the schemas above, or `list[...]` of one.

    Raises:
        FileNotFoundError, OSError: from the system.
        InputError: or `error`: it is not JSON, or not of this kind.
    """
    return parse_json(path.read_bytes(), kind, str(path), error)


def parse_json(text: bytes | str, kind: Any, where: str, error: type[InputError] = InputError) -> Any:
    """As `read_json`, for text that stands in `where`."""
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as problem:
        raise error(f"{where}: cannot be read as JSON ({first_line(problem)})") from problem
    return check(value, kind, where, error)


def check(value: Any, kind: Any, where: str, error: type[InputError] = InputError) -> Any:
    """The value itself, if it is of this kind."""
    try:
        _adapter(kind).validate_python(value)
    except (ValidationError, RecursionError) as problem:
        raise error(f"{where}: {_said(problem)}") from problem
    return value


_adapter = cache(TypeAdapter)


def _said(problem: Exception) -> str:
    if not isinstance(problem, ValidationError):
        return "nested too deep"
    found = [problem_text(".".join(map(str, each["loc"])) or "it", each) for each in problem.errors()[:_N_SHOWN]]
    more = problem.error_count() - len(found)
    return "; ".join(found) + (f"; and {more} more" if more else "")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found
