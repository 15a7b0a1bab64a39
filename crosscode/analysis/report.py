"""`report.html`: one self-contained page about a run."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from crosscode.analysis import cards, header, latent_plots
from crosscode.analysis.encoded import HeldoutBatch
from crosscode.analysis.latents_frame import latents_frame, write_csv, write_parquet
from crosscode.analysis.latents_pass import LatentsPass, study_latents
from crosscode.analysis.run_record import RunRecord, read_run
from crosscode.analysis.training_curves import training_figures
from crosscode.errors import CrosscodeError, InputError
from crosscode.files import write_text
from crosscode.models.base import BaseCrosscoder
from crosscode.models.split import Split


@dataclass(frozen=True)
class HeldoutText:
    """What a report needs to show latents on text."""

    batches: Iterable[HeldoutBatch]
    tokenizer: Any
    split: Split
    position_names: Sequence[str]


def write_report(
    run: str | Path,
    *,
    model: BaseCrosscoder | None = None,
    heldout: Callable[[], HeldoutText] | None = None,
    output: Path | None = None,
    latents_csv: Path | None = None,
    latents_parquet: Path | None = None,
) -> Path:
    """Write `report.html` of a run, finished or not.

    Args:
        run: the run directory.
        model: the trained model, scaling folded in; default: `final/`.
        heldout: opens held-out text with activations; called once. Without it the page shows no latents.
        output: the page; default: `report.html` in the run.
        latents_csv, latents_parquet: also write the table of all latents there.

    Returns:
        Path of the page.

    Raises:
        InputError: `run` is no run directory, or a table is wanted of latents that could not be looked at. Anything else
            that is missing leaves out a section, which the page says.
    """
    record = read_run(run)
    study: LatentsPass | None = None
    tokenizer: Any = None
    reason = None
    try:
        if model is None:
            model = BaseCrosscoder.load(record.path / "final")
        if heldout is not None:
            text = heldout()
            tokenizer = text.tokenizer
            study = study_latents(model, text.batches, text.split, text.position_names)
    except (CrosscodeError, OSError) as error:
        reason = str(error)
    page = render(record, model, study, tokenizer, reason)
    path = output or record.path / "report.html"
    write_text(path, page)
    if latents_csv is not None or latents_parquet is not None:
        if study is None:
            raise InputError(f"table of latents: they were not looked at: {reason or 'no held-out text'}")
        frame = latents_frame(study)
        if latents_csv is not None:
            write_csv(frame, latents_csv)
        if latents_parquet is not None:
            write_parquet(frame, latents_parquet)
    return path


def render(
    record: RunRecord,
    model: BaseCrosscoder | None,
    study: LatentsPass | None,
    tokenizer: Any,
    no_latents_reason: str | None = None,
) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("crosscode.analysis", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup
    problems = list(record.problems)
    if study is None:
        problems.append(f"Latents were not looked at: {no_latents_reason or 'no held-out text'}.")
    context = {
        "name": record.path.resolve().name,
        "description": header.description(record),
        "problems": problems,
        "tiles": header.tiles(record),
        "config_yaml": record.config_yaml,
        "curves": training_figures(record.metrics, record.summary.get("callbacks") or ()),
        "evaluation": header.evaluation_table(record),
        "facts": header.facts(record),
        "latents": latent_plots.latents_section(study),
        "pairs": [] if study is None else [latent_plots.pair_section(pair) for pair in study.pairs],
        "groups": [] if study is None else cards.card_groups(study, tokenizer),
        "table": None if study is None else cards.latent_table(study),
    }
    template = environment.get_template("report.html.j2")
    script = template.render(context, content_security_policy="").rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return template.render(context, content_security_policy=policy)
