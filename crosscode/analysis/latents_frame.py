"""The table of all latents, for every architecture: what `Run.table()` gives and `crosscode report --csv` writes.

Axes: X output crosscoding positions (flattened) · L latents.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from crosscode.analysis.diffing import DiffTable, as_cell
from crosscode.analysis.latents_pass import LatentsPass
from crosscode.analysis.verdict import Verdict
from crosscode.analysis.wording import distinct_labels
from crosscode.files import write_output

if TYPE_CHECKING:
    import pandas


def latents_frame(study: LatentsPass) -> pandas.DataFrame:
    """A row for each latent, by its number.

    Columns: how often and how strongly it fires on held-out text; `density_GROUP`, on which share of the tokens of a text of
    a mixture, and of those of a role (assistant, user, ...), where there are several, and with `_GROUP` at their ends what
    latent scaling and the verdict are on these tokens alone; where it was looked at,
    `density_on_text_of_NAME`, on what the model writes itself; `decoder_norm_NAME` of each output position, in the scale of
    training; and for each pair of positions that is compared `relative_norm_NAME`, the share of the second one in the sum of
    both norms (0: written to the first alone, 1: to the second alone), cosines and latent scaling; for each two models the
    verdict: `tag`, `rank_NAME` (place among those that lean to NAME, from 1), `effect` and `why`; of an SAE on a difference
    all are undecided, and `why` says it. NAME is the model where the models differ, else the hookpoint; where more than two
    models are compared, both names of a pair end its columns. Of a
    compound model `layer` and `index` name a latent. NaN: not defined.
    """
    import pandas

    labels = distinct_labels(study.position_names)
    firing = study.firing
    columns: dict[str, Any] = {}
    if study.layers is not None:
        columns["layer"], columns["index"] = zip(*study.layers, strict=True)
    columns |= {
        "firings": firing.counts_L,
        "density": firing.density_L,
        "mean_active": firing.mean_active_L,
        "max_activation": firing.max_L,
    }
    groups = [(kind, name, own) for kind, of_kind in firing.groups().items() for name, own in of_kind.items()]
    columns |= {f"density_{group_label(study, kind, name)}": own.density_L for kind, name, own in groups}
    columns |= {f"density_on_text_of_{name}": firing.density_L for name, firing in study.own_text.items()}
    for x, name in enumerate(study.position_names):
        columns["_".join(filter(None, ("decoder_norm", labels[name])))] = study.decoder_norm_LX[:, x]
    for verdict in study.verdicts:
        columns |= _verdict_columns(verdict, several=len(study.verdicts) > 1)
    if study.without_verdict:
        columns |= {"tag": "undecided", "why": study.without_verdict}
    for pair in study.pairs:
        columns |= _pair_columns(pair, labels, several=len(study.pairs) > 1, several_models=len(study.verdicts) > 1)
    for kind, name, _ in groups:
        end = f"_{group_label(study, kind, name)}"
        for verdict in study.apart[kind][name]:
            own = _verdict_columns(verdict, several=len(study.verdicts) > 1, end=end)
            columns |= {column: value for column, value in own.items() if not column.startswith("why")}
            for pair in verdict.tables:
                columns |= _nu_columns(pair, labels, several=len(study.pairs) > 1, end=end)
    # sentences are long: the last column
    columns |= {name: columns.pop(name) for name in list(columns) if name.startswith("why")}
    plain = {as_cell(name): one.numpy() if isinstance(one, Tensor) else one for name, one in columns.items()}
    return pandas.DataFrame(plain, index=pandas.RangeIndex(study.decoder_norm_LX.shape[0], name="latent"))


def group_label(study: LatentsPass, kind: str, name: str) -> str:
    """The name of a group, or what tells it apart from others of its kind; with the kind, where another has it as well."""
    others = [of_kind for other, of_kind in study.apart.items() if other != kind]
    label = distinct_labels([*study.apart[kind]])[name] or name
    return f"{kind}_{label}" if any(label in of_kind for of_kind in others) else label


def _verdict_columns(verdict: Verdict, *, several: bool, end: str = "") -> dict[str, Any]:
    a, b = verdict.name_a, verdict.name_b
    both = (f"_{a}_{b}" if several else "") + end
    columns: dict[str, Any] = {f"tag{both}": [as_cell(name) for name in verdict.names]}
    columns |= {f"rank_{name}{both}": verdict.rank_L(name) for name in (a, b)}
    return columns | {f"effect{both}": verdict.effect_L, f"why{both}": [as_cell(reason) for reason in verdict.why]}


def _pair_columns(pair: DiffTable, labels: dict[str, str], *, several: bool, several_models: bool) -> dict[str, Any]:
    a, b = labels[pair.name_a], labels[pair.name_b]
    both = f"_{a}_{b}" if several else ""
    of_two = both if several_models else ""  # a position stands in several pairs
    columns: dict[str, Any] = {f"relative_norm_{b}{of_two}": pair.relative_norm}
    columns |= {f"{name}{both}": getattr(pair, name) for name in ("decoder_cosine", "encoder_cosine")}
    columns |= _nu_columns(pair, labels, several=several)
    shares = {} if pair.scaling is None else pair.scaling.shares
    for side, label in enumerate((a, b)):
        columns[f"encoder_norm_{label}"] = (pair.encoder_norm_a, pair.encoder_norm_b)[side]
        columns |= {f"beta_{kind}_{label}{of_two}": share.beta_L2[:, side] for kind, share in shares.items()}
    return columns


def _nu_columns(pair: DiffTable, labels: dict[str, str], *, several: bool, end: str = "") -> dict[str, Any]:
    both = (f"_{labels[pair.name_a]}_{labels[pair.name_b]}" if several else "") + end
    shares = {} if pair.scaling is None else pair.scaling.shares
    return {f"nu_{kind}{both}": share.nu_L for kind, share in shares.items()}


def write_csv(frame: pandas.DataFrame, path: Path) -> None:
    """A header and a row for each latent, six digits; undefined values are empty. `path` may be a pipe."""
    write_output(path, frame.to_csv(float_format="%.6g", lineterminator="\n").encode())


def write_parquet(frame: pandas.DataFrame, path: Path) -> None:
    """All digits; `latent` is a column."""
    buffer = io.BytesIO()
    frame.reset_index().to_parquet(buffer, index=False)
    write_output(path, buffer.getvalue())
