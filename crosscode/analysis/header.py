"""The head of the report: what was trained, its key figures, and what it was made with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from crosscode.analysis.plots import si_number
from crosscode.analysis.run_record import RunRecord
from crosscode.analysis.wording import (
    FigureTable,
    distinct_labels,
    duration_text,
    join_and,
    model_name,
    number_text,
    percent_text,
    with_article,
)
from crosscode.models import ACTIVATIONS, ARCHITECTURES


@dataclass(frozen=True)
class Tile:
    """One key figure."""

    label: str
    value: str
    note: str = ""


def description(record: RunRecord) -> str:
    """One sentence: what was trained on what."""
    model = record.model_config.get("model", {})
    metadata = record.metadata
    language_models = [model_name(m) for m in metadata.get("language_models") or []]
    hookpoints = metadata.get("hookpoints") or []
    if not model:
        return "A run without a final model."
    activation = model.get("activation", {})
    architecture = _architecture(record)
    kind = ARCHITECTURES.config_class(architecture).title if architecture in ARCHITECTURES else architecture
    k = f", k = {activation['k']}" if "k" in activation else ""
    scheme = str(activation.get("type", "?"))
    scheme = ACTIVATIONS[scheme].title if scheme in ACTIVATIONS else scheme
    text = f"{with_article(kind)} with {model.get('n_latents', 0):,} latents ({scheme}{k})"
    if language_models:
        text += f" on {join_and(language_models)}"
    return text + (f" at {join_and(hookpoints)}." if hookpoints else ".")


def _architecture(record: RunRecord) -> str:
    return str(record.metadata.get("architecture", record.model_config.get("model", {}).get("kind", "model")))


def tiles(record: RunRecord) -> list[Tile]:
    """The figures that one asks for first."""
    found: list[Tile] = []
    by_position, held_out = record.fvu_by_position()
    note = "held out" if held_out else "last training batch"
    if 1 <= len(by_position) <= 4:
        labels = distinct_labels(list(by_position))
        found += [Tile(f"FVU {labels[name]}".strip(), number_text(value), note) for name, value in by_position.items()]
    elif by_position:
        found.append(Tile("FVU", number_text(record.figure("fvu")), f"{note}, all positions"))
        found.append(Tile("FVU, worst position", number_text(max(by_position.values())), note))
    recovered = [r["loss_recovered"] for r in record.loss_recovered().values() if r.get("loss_recovered") is not None]
    if recovered:
        note = "next-token loss" + (", worst position" if len(recovered) > 1 else "")
        found.append(Tile("Loss recovered", percent_text(min(recovered)), note))
    if closes := record.evaluation.get("closes"):
        found.append(Tile("Closes", _closed_text(closes), "of KL(B || A), by the specific latents"))
    found.append(Tile("L0", number_text(record.figure("l0")), _l0_note(record)))
    dead = record.figure("dead_fraction")
    note = "never active on held-out text" if record.evaluation else ""
    found.append(Tile("Dead latents", percent_text(dead), note))
    tokens = record.summary.get("tokens") or record.metrics.last("tokens")
    if tokens:
        found.append(Tile("Training tokens", si_number(tokens), f"{record.summary.get('step', '')} steps".strip()))
    speed = record.summary.get("tokens_per_s") or record.metrics.last("tokens_per_s")
    if speed:
        found.append(Tile("Tokens / s", si_number(speed), "harvest included"))
    wall = record.summary.get("wall_s") or record.metrics.last("elapsed_s")
    if wall:
        backend = " on ".join(str(record.summary[key]) for key in ("backend", "device") if record.summary.get(key))
        found.append(Tile("Wall time", duration_text(wall), backend))
    return found


def facts(record: RunRecord) -> list[tuple[str, str]]:
    """Where the figures come from: backend, device, versions, models."""
    rows = [(key, str(record.summary[key])) for key in ("backend", "device") if record.summary.get(key)]
    versions = record.summary.get("versions")
    if versions:
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    if (share := record.figure("without_partner")) is not None:
        about = "of held-out positions are left out: no token of another model's tokenizer ends there"
        rows.append(("different tokenizers", f"{percent_text(share)} {about}"))
    for model in record.metadata.get("language_models") or []:
        details = ", ".join(f"{key} {value}" for key, value in model.items() if value and key != "name")
        rows.append((f"model {model_name(model)}", details))
    return rows


def evaluation_table(record: RunRecord) -> FigureTable | None:
    """The held-out evaluation; None where there was none."""
    by_position, held_out = record.fvu_by_position()
    if not held_out:
        return None
    columns = [
        ("position", "model and hookpoint"),
        ("FVU", "fraction of variance unexplained"),
        ("explained variance", "1 - FVU"),
    ]
    rows = {name: [name, number_text(value), percent_text(1 - value)] for name, value in by_position.items()}
    total = record.figure("fvu")
    if len(rows) > 1 and total is not None:
        rows["all positions"] = ["all positions", number_text(total), percent_text(1 - total)]
    for prefix in record.evaluation.get("prefixes") or []:
        name = f"first {prefix['n_latents']} latents alone (L0 {number_text(prefix['l0'])})"
        rows[name] = [name, number_text(prefix["fvu"]), percent_text(1 - prefix["fvu"])]
    spliced = record.loss_recovered()
    if spliced:
        columns += [
            (
                "loss recovered (95 %)",
                "(CE zeroed - CE spliced) / (CE zeroed - CE clean), with confidence interval",
            ),
            ("CE clean", "cross-entropy of the language model as it is, nats per token"),
            ("CE spliced", "with the reconstruction in place of the activations, nats per token"),
            ("CE zeroed", "with zeros in place of the activations, nats per token"),
            ("KL spliced", "divergence from the clean model's predictions, nats per token"),
        ]
        for name, row in rows.items():
            row += _spliced_cells(spliced[name]) if name in spliced else [""] * 5
        layered = record.evaluation.get("replacement_model") or {}
        for way, ce in (layered.get("ce") or {}).items():
            numbers = (number_text(one) for one in (layered.get("ce_clean"), ce))
            kl = number_text((layered.get("kl") or {}).get(way))
            rows[way] = [f"all layers, {way.replace('_', ' ')}", "", "", "", *numbers, "", kl]
    return FigureTable(columns, list(rows.values()))


def group_table(record: RunRecord) -> FigureTable | None:
    """Held-out figures apart by source and role; None where there is nothing to tell apart."""
    groups = record.evaluation.get("groups") or {}
    if not groups:
        return None
    names = list(next(iter(next(iter(groups.values())).values()))["fvu_by_position"])
    labels = distinct_labels(names)
    columns = [("by", ""), ("tokens", "held-out tokens of this group"), ("L0", "active latents per token")]
    columns += [(f"FVU {labels[name]}".strip(), f"with the group's own variance, at {name}") for name in names]
    spliced, says = record.loss_recovered(), "of predictions of these tokens"
    closes, layered = (record.evaluation.get(key) or {} for key in ("closes", "replacement_model"))
    closed_says = f"share of KL(B || A) that the specific latents take away, {says}"
    apart = [
        (f"loss recovered {label}".strip(), f"{says}, at {name}", spliced[name], _recovered_text)
        for name, label in distinct_labels([*spliced]).items()
    ]
    apart += [("closes", closed_says, closes, _closed_text)]
    apart += [
        (f"KL all layers, {way.replace('_', ' ')}", f"nats, {says}", layered, partial(_kl_text, way=way))
        for way in layered.get("kl") or {}
    ]
    apart = [column for column in apart if column[2].get("groups")]
    rows = [
        [f"{kind}: {name}", f"{of['n_tokens']:,}", number_text(of.get("l0"))]
        + [number_text(of["fvu_by_position"].get(position)) for position in names]
        + [text(whole["groups"].get(kind, {}).get(name) or {}) for _, _, whole, text in apart]
        for kind, found in groups.items()
        for name, of in found.items()
    ]
    return FigureTable(columns + [(name, meaning) for name, meaning, _, _ in apart], rows)


def _closed_text(found: dict[str, Any]) -> str:
    return _share_text(found.get("share"), found.get("share_ci95"))


def _kl_text(found: dict[str, Any], way: str) -> str:
    return number_text((found.get("kl") or {}).get(way))


def _recovered_text(found: dict[str, Any]) -> str:
    return _share_text(found.get("loss_recovered"), (found.get("ci95") or {}).get("loss_recovered"))


def _share_text(share: float | None, bounds: list[float] | None) -> str:
    text = percent_text(share)
    return text if share is None or not bounds else f"{text} ({100 * bounds[0]:.1f}–{100 * bounds[1]:.1f})"


def _spliced_cells(found: dict[str, Any]) -> list[str]:
    return [
        _recovered_text(found),
        *(number_text(found.get(key)) for key in ("ce_clean", "ce_spliced", "ce_zero", "kl_spliced")),
    ]


def _l0_note(record: RunRecord) -> str:
    train_mode, low, high = (record.evaluation.get(key) for key in ("l0_train_mode", "l0_p5", "l0_p95"))
    if train_mode is not None:
        return f"by threshold; {train_mode:.3g} over batches"
    if low is not None and high is not None and low != high:
        return f"5–95 %: {low:.3g}–{high:.3g}"
    return "active latents per token"
