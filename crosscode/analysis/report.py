"""A run's pages: `report.html`, one self-contained summary, and `report/index.html`, the explorer of every latent."""

from __future__ import annotations

import base64
import hashlib
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from crosscode.analysis import cards, header, latent_plots
from crosscode.analysis.encoded import HeldoutBatch
from crosscode.analysis.first_look import Look, Steered, first_looks
from crosscode.analysis.jinja import environment
from crosscode.analysis.latents_frame import latents_frame, write_csv, write_parquet
from crosscode.analysis.latents_pass import MAX_PAIRS, LatentsPass, with_own_text
from crosscode.analysis.records import LatentRecords, OtherText, Unembed, study_records
from crosscode.analysis.run_record import RunRecord, read_run
from crosscode.analysis.site_data import scripts
from crosscode.analysis.tokens import TokenDisplay
from crosscode.analysis.training_curves import training_figures
from crosscode.analysis.wording import join_and
from crosscode.errors import CrosscodeError, InputError
from crosscode.files import write_text
from crosscode.models.base import BaseCrosscoder
from crosscode.models.checkpoint import load_model
from crosscode.models.split import Split

log = logging.getLogger("crosscode")


@dataclass(frozen=True)
class HeldoutText:
    """What a report needs to show latents on text."""

    batches: Iterable[HeldoutBatch]
    tokenizer: Any
    split: Split
    position_names: Sequence[str]
    unembeds: Mapping[int, Unembed] = field(default_factory=dict)
    """of output positions, from vectors there to logits"""
    displays: Mapping[int, TokenDisplay] = field(default_factory=dict)
    """of output positions whose language model has a tokenizer of its own"""
    groupings: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """ways to group tokens, with the names of the groups"""
    steered: Steered | None = None
    """says what adding a latent does"""
    own_text: Mapping[str, Iterable[HeldoutBatch]] = field(default_factory=dict)
    """what each language model writes itself, by its name"""
    tokenizers: Mapping[str, Any] = field(default_factory=dict)
    """where there are several: by the names of the models that read its tokens, the first of which is `tokenizer`; then batches
    have `others`"""


_EXPLORER = Path(__file__).parent / "explorer"
_POLICY = "content-security-policy"  # the word in a page until its script is known


@dataclass(frozen=True)
class Explorer:
    """What makes the summary the first page of the explorer."""

    css: str
    script: str


def write_report(
    run: str | Path,
    *,
    model: BaseCrosscoder | None = None,
    heldout: Callable[[], HeldoutText] | None = None,
    output: Path | None = None,
    latents_csv: Path | None = None,
    latents_parquet: Path | None = None,
    also: Callable[[LatentsPass, LatentRecords], object] | None = None,
    say: Callable[[str], None] = lambda _: None,
    is_checked: bool = False,
) -> Path:
    """Write `report.html` of a run, finished or not, and beside it, where latents can be looked at, `report/index.html`.

    Args:
        run: the run directory.
        model: the trained model, scaling folded in; default: `final/`.
        heldout: opens held-out text with activations; called once. Without it the page shows no latents.
        output: the page; default: `report.html` in the run.
        latents_csv, latents_parquet: also write the table of all latents there.
        also: what else is made of the same pass.
        say: is told what was found, a line at a time.
        is_checked: every byte of `final/` was compared with its checksums just now.

    Returns:
        Path of the page.

    Raises:
        InputError: `run` is no run directory, or a table is wanted of latents that could not be looked at. Anything else
            that is missing leaves out a section, which the page says.
    """
    record = read_run(run)
    study: LatentsPass | None = None
    records: LatentRecords | None = None
    tokenizer: Any = None
    tokenizers: Mapping[str, Any] = {}
    reason: str | None = None
    looks: list[Look] = []
    try:
        if model is None:
            place = {"backend": "auto", "device": torch.device("cpu")}
            model = load_model(BaseCrosscoder, record.path / "final", **place, checked=is_checked)
        if heldout is not None:
            text = heldout()
            tokenizer, tokenizers = text.tokenizer, text.tokenizers
            more = {"groupings": text.groupings, "displays": text.displays}
            study, records = study_records(model, text.batches, text.split, text.position_names, text.unembeds, **more)
            study = with_own_text(study, model, text.own_text, text.split)
            looks = first_looks(study, records, tokenizer, text.steered)
            for line in (line for look in looks for line in look.lines):
                say(line)
            for one in study.verdicts:
                say(f"{one.name_a} against {one.name_b}: " * (len(study.verdicts) > 1) + one.headline())
    except (CrosscodeError, OSError) as error:
        reason = str(error)
    for problem in [*record.problems, *([f"latents were not looked at: {reason}"] if reason else [])]:
        log.warning("report: %s", problem)
    others = [] if records is None else records.texts.in_others(tokenizers)
    shown = contents(record, study, tokenizer, reason, looks=looks, others=others)
    path = output or record.path / "report.html"
    write_text(path, render(shown))
    if study is not None and records is not None:
        write_explorer(path.parent / "report", shown, study, records, tokenizer, tokenizers)
    if latents_csv is not None or latents_parquet is not None or also is not None:
        if study is None or records is None:
            raise InputError(f"table of latents: they were not looked at: {reason or 'no held-out text'}")
        frame = latents_frame(study)
        if latents_csv is not None:
            write_csv(frame, latents_csv)
        if latents_parquet is not None:
            write_parquet(frame, latents_parquet)
        if also is not None:
            also(study, records)
    return path


def write_explorer(
    folder: Path,
    shown: Mapping[str, Any],
    study: LatentsPass,
    records: LatentRecords,
    tokenizer: Any,
    tokenizers: Mapping[str, Any],
) -> None:
    """`index.html` and what it reads, into a folder that only this fills; the page comes last. `shown`: `contents`."""
    data = folder / "data"
    if data.is_dir() and not data.is_symlink():
        shutil.rmtree(data)
    data.mkdir(parents=True)
    for name, text in scripts(study, records, tokenizer, tokenizers):
        write_text(data / f"{name}.js", text)
    for name in ("tabulator.min.js", "tabulator.LICENSE"):
        write_text(folder / name, (_EXPLORER / name).read_text(encoding="utf-8"))
    css, script = (
        "\n".join((_EXPLORER / name).read_text(encoding="utf-8") for name in names)
        for names in (("tabulator_simple.min.css", "app.css"), ("order.js", "parts.js", "app.js"))
    )
    write_text(folder / "index.html", render(shown, Explorer(css, script)))


def contents(
    record: RunRecord,
    study: LatentsPass | None,
    tokenizer: Any,
    no_latents_reason: str | None = None,
    looks: Sequence[Look] = (),
    others: Sequence[OtherText] = (),
) -> dict[str, Any]:
    """What either page shows, its figures drawn."""
    problems = list(record.problems)
    if study is None:
        problems.append(f"Latents were not looked at: {no_latents_reason or 'no held-out text'}.")
    elif study.not_compared:
        left_out = join_and([" with ".join(pair) for pair in study.not_compared])
        problems.append(f"Only {MAX_PAIRS} pairs of positions are compared; not compared: {left_out}.")
    return {
        "name": record.path.resolve().name,
        "description": header.description(record),
        "problems": problems,
        "tiles": header.tiles(record),
        "config_yaml": record.config_yaml,
        "curves": training_figures(record.metrics, record.summary.get("callbacks") or ()),
        "evaluation": header.evaluation_table(record),
        "apart": header.group_table(record),
        "facts": header.facts(record),
        "latents": latent_plots.latents_section(study),
        "without_verdict": "" if study is None else study.without_verdict,
        "pairs": [] if study is None else latent_plots.pair_sections(study),
        "groups": [] if study is None else cards.card_groups(study, tokenizer, others),
        "looks": looks,
        "tables": [] if study is None else cards.latent_tables(study),
    }


def render(shown: Mapping[str, Any], explorer: Explorer | None = None) -> str:
    """A page as text: the summary alone, or as the first page of the explorer."""
    page = environment().get_template("report.html.j2").render(shown, explorer=explorer, policy=_POLICY)
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # What the page's own script adds may run: of a page from disk no other word for "beside it" is heard by all browsers.
    more = "" if explorer is None else " 'strict-dynamic'; connect-src 'self'"
    nothing = "default-src 'none'; base-uri 'none'; form-action 'none'"
    policy = f"{nothing}; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'{more}"
    return page.replace(_POLICY, policy, 1)
