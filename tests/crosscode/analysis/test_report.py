"""The page: complete, self-contained, safe with any text, and robust against anything that is missing."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest
import torch

from crosscode.analysis.cards import card_groups, latent_tables
from crosscode.analysis.latents_frame import latents_frame
from crosscode.analysis.latents_pass import pairs_to_compare, spread_over_density, study_latents
from crosscode.analysis.report import HeldoutText, write_report
from crosscode.analysis.tokens import TokenDisplay
from crosscode.analysis.verdict import MIN_FIRINGS
from crosscode.analysis.wording import short_names
from crosscode.errors import InputError
from crosscode.models import (
    BaseCrosscoder,
    CompoundCrossLayerTranscoder,
    CrossLayerTranscoder,
    SAEOrTranscoder,
    TopkActivation,
)
from crosscode.models.architecture import split_for

EVIL = "<img src=x onerror=alert(1)>"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Structure of a page; fails on tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text_of, self.elements = [], {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text_of.setdefault(self.open[-1], []).append(data)

    def has(self, tag, **attributes):
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in attributes.items())]

    def headings(self):
        return [text.strip() for text in self.text_of.get("h2", []) if text.strip()]


def page_of(run, **options):
    if isinstance(options.get("heldout"), HeldoutText):
        text = options["heldout"]
        options["heldout"] = lambda: text
    return Page(write_report(run, **options).read_text(encoding="utf-8"))


@pytest.fixture
def full_page(make_run, heldout_text):
    return page_of(make_run(), heldout=heldout_text(sizes=(30,)))


def test_the_report_of_a_model_diff_has_all_its_sections(full_page):
    assert full_page.headings() == [
        "Training",
        "Held-out reconstruction",
        "base against tuned at blocks.1.hook_resid_post",
        "Leaning most to tuned",
        "Leaning most to base",
        "Table of latents",
        "Made with",
    ]
    titles = full_page.text_of["h3"]
    assert titles == [
        "Loss", "Fraction of variance unexplained", "L0", "Dead latents",
        "Relative decoder norm", "Decoder cosine", "Latent scaling", "Firing density",
    ]  # fmt: skip
    captions = "".join(full_page.text_of["figcaption"])
    assert "points from base on the left (0) to tuned on the right (1)" in captions
    assert len(full_page.text_of["figcaption"]) == len(titles) == len(full_page.has("svg"))
    tiles = dict(zip(full_page.text_of["dt"], full_page.text_of["dd"], strict=False))
    assert (tiles["FVU base"], tiles["FVU tuned"], tiles["L0"]) == ("0.200", "0.220", "4.00")
    assert tiles["Dead latents"] == "12.5 %" and tiles["Tokens / s"] == "1.23k" and tiles["Wall time"] == "61 s"
    assert len(full_page.has("article")) == 10
    assert any("n_tokens: 1000" in text for text in full_page.text_of["pre"])


def test_the_page_names_first_where_the_models_differ_most(make_run, make_model, heldout_text):
    said, asked = [], []
    text = dataclasses.replace(
        heldout_text(sizes=(30,)),
        unembeds=dict.fromkeys(range(2), lambda vectors_ND: torch.arange(300.0).expand(len(vectors_ND), 300)),
        steered=lambda latent, model: asked.append((latent, model)) or f"Added, {EVIL} happens.",
    )
    run = make_run(make_model())
    page = page_of(run, heldout=text, say=said.append)
    study = study_latents(BaseCrosscoder.load(run / "final"), text.batches, text.split, text.position_names)
    assert asked == [(latent, "tuned") for latent in study.verdicts[0].ranking("tuned")[:3]] and len(asked) == 3
    heading, *looks, headline = said
    assert heading == "Where tuned differs most from base:" and headline == study.verdicts[0].headline()
    for (latent, _), look in zip(asked, looks, strict=True):
        peak = study.top.examples(latent)[0]
        shown = TokenDisplay(text.tokenizer)([int(peak.tokens[peak.peak])], [1.0])[0].text
        assert look.startswith(f"Latent {latent} fires most on “")
        if len(shown) == 1 and shown.isascii():
            assert f"«{shown}»" in look
        assert "promotes the next tokens “" in look and look.endswith(f" Added, {EVIL} happens.")
    assert set(looks) <= set(page.text_of["li"]) and not page.has("img")


def test_the_report_needs_nothing_from_outside(make_run, heldout_text):
    text = write_report(make_run(), heldout=heldout_text).read_text(encoding="utf-8")
    page = Page(text)
    assert not page.has("link") and not page.has("img") and not page.has("iframe") and not page.has("base")
    assert all("src" not in attributes for _, attributes in page.elements)
    for _, attributes in page.elements:
        for name, value in attributes.items():
            if name.endswith("href"):
                assert value.startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"https?://|@import|url\((?!#)", text)


def test_names_and_config_of_a_hostile_run_are_shown_as_text(make_run, heldout_text, make_model):
    names = [f"{EVIL}/h", "tuned/h"]
    metadata = {"language_models": [{"name": EVIL, "path": EVIL}], "hookpoints": [EVIL], "architecture": EVIL}
    run = make_run(make_model(), position_names=names, metadata=metadata)
    (run / "config.yaml").write_text(f"name: '</pre><script>{EVIL}'", encoding="utf-8")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"backend": EVIL, "versions": {EVIL: EVIL}}))
    page = page_of(run, heldout=heldout_text(position_names=names))
    assert not page.has("img") and len(page.has("script")) == 1
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


@pytest.mark.usefixtures("quick_plots")
def test_html_in_the_text_of_snippets_is_shown_as_text(make_run, heldout_text, byte_tokenizer):
    ids = byte_tokenizer("x<em>&\"'</code>y", add_special_tokens=False)["input_ids"]
    assert len(ids) >= 10
    heldout = heldout_text(sizes=(30,), length=len(ids) + 1)
    for batch in heldout.batches:
        batch.tokens_HS[:, 1:] = torch.tensor(ids)
    page = page_of(make_run(), heldout=heldout)
    assert not page.has("em") and page.has("code")
    spans = "".join(page.text_of["span"])
    assert "<em>" in spans and "</code>" in spans and "&" in spans


def test_two_reports_of_a_run_are_equal(make_run, heldout_text):
    run = make_run()
    first = write_report(run, heldout=heldout_text).read_bytes()
    assert write_report(run, heldout=heldout_text).read_bytes() == first


def test_the_strongest_token_is_outlined_and_fully_shaded(full_page):
    peaks = [a for a in full_page.has("span") if "peak" in (a.get("class") or "").split()]
    n_snippets = len([a for a in full_page.has("li") if not a])
    assert peaks and len(peaks) <= n_snippets
    shades = [float(a["style"].removeprefix("--s:")) for a in full_page.has("span") if "style" in a]
    assert max(shades) == 1.0 and min(shades) > 0


def test_listed_latents_fire_enough_and_lean_the_right_way(make_model, heldout_text):
    model = make_model(n_latents=64)
    heldout = heldout_text(sizes=(60,))
    study = study_latents(model, heldout.batches, heldout.split, heldout.position_names)
    table, groups = study.pairs[0], card_groups(study, heldout.tokenizer)
    assert [len(group.cards) for group in groups] == [5, 5]
    assert int((study.firing.counts_L < MIN_FIRINGS).sum()) > 0
    for group, leans in zip(groups, (lambda r: r > 0.5, lambda r: r < 0.5), strict=True):
        for card in group.cards:
            assert study.firing.counts_L[card.latent] >= MIN_FIRINGS and leans(table.relative_norm[card.latent])
            assert 0 < len(card.top) <= 8 and card.why
    (verdict,) = study.verdicts
    rows = latent_tables(study)[0].rows
    assert [int(row[0][0]) for row in rows] == [*verdict.ranking("tuned"), *verdict.ranking("base")]


@pytest.mark.usefixtures("quick_plots")
def test_classes_without_latents_are_said_to_be_empty(make_run, make_model, heldout_text):
    model = make_model()
    with torch.no_grad():
        model.W_dec_LXoDo[:, 1] = 0
    page = page_of(make_run(model), heldout=heldout_text(sizes=(60,)))
    assert "Most specific to base" in page.headings() and "Leaning most to tuned" in page.headings()
    assert any("No latent that fires at least 20 times leans to tuned" in text for text in page.text_of["p"])


@pytest.mark.usefixtures("quick_plots")
def test_a_model_that_never_fires(make_run, make_model, heldout_text):
    model = make_model()
    with torch.no_grad():
        model.b_enc_L.fill_(-1e6)
    page = page_of(make_run(model), heldout=heldout_text)
    assert page.has("article") == [] and "Table of latents" not in page.headings()


@pytest.mark.usefixtures("quick_plots")
@pytest.mark.parametrize(("architecture", "title"), [("sae", "An SAE"), ("diff_sae", "An SAE on the difference")])
def test_a_run_of_a_single_position_shows_latents_by_density(make_run, heldout_text, architecture, title):
    torch.manual_seed(0)
    model = SAEOrTranscoder(d_in=8, d_out=8, n_latents=24, activation_fn=TopkActivation(4, 24), backend="torch")
    for param in model.parameters():
        param.data = torch.randn(param.shape)
    names = ["base/h"]
    run = make_run(model, position_names=names, metadata={"architecture": architecture, "hookpoints": ["h"]})
    n_models = 1 + (architecture == "diff_sae")
    page = page_of(run, heldout=heldout_text(names, architecture, n_models=n_models, sizes=(20,)))
    assert "Latents from frequent to rare" in page.headings() and "Latents" in page.headings()
    assert page.text_of["h3"][-1] == "Firing density" and len(page.has("article")) == 10
    assert any(f"{title} with 24 latents (TopK, k = 4)" in text for text in page.text_of["p"])
    assert any("no verdict by model" in text for text in page.text_of["p"]) == (architecture == "diff_sae")
    assert page.text_of["span"].count("undecided") == 10 * (architecture == "diff_sae")


@pytest.mark.usefixtures("quick_plots")
def test_a_cross_layer_transcoder_is_compared_between_its_first_and_last_output(make_run, heldout_text):
    torch.manual_seed(0)
    model = CrossLayerTranscoder(
        n_out_hookpoints=3, d_in=8, d_out=8, n_latents=24, activation_fn=TopkActivation(4, 24), backend="torch"
    )
    for param in model.parameters():
        param.data = torch.randn(param.shape)
    names = [f"base/{i}.out" for i in range(3)]
    run = make_run(model, position_names=names)
    page = page_of(run, heldout=heldout_text(names, "cross_layer_transcoder", n_models=1, n_hookpoints=4, sizes=(20,)))
    assert "0.out against 2.out" in page.headings() and "Leaning most to 2.out" in page.headings()
    assert "Decoder norm by position" in page.text_of["h3"]


@pytest.mark.usefixtures("quick_plots")
def test_latents_of_later_layers_of_a_compound_transcoder_do_not_write_to_earlier_ones(make_run, heldout_text):
    torch.manual_seed(0)
    model = CompoundCrossLayerTranscoder(
        n_layers=2, d_in=8, d_out=8, n_latents=24, activation_fn=TopkActivation(4, 24), backend="torch"
    )
    for param in model.parameters():
        param.data = torch.randn(param.shape)
    scaling_P = torch.tensor([0.5, 2.0])
    model.fold_activation_scaling_into_weights_(scaling_P, scaling_P)
    names = ["base/0.out", "base/1.out"]
    options = {"kind": "compound_cross_layer_transcoder", "n_models": 1, "n_hookpoints": 4, "sizes": (20,)}
    heldout = heldout_text(names, **options)
    study = study_latents(model.eval(), heldout.batches, heldout.split, names)
    (verdict,) = study.verdicts
    assert "structural" not in verdict.tag[:12] and set(verdict.tag[12:]) == {"structural"}
    assert verdict.why[12] == "The architecture cannot write it to 0.out: that is no finding."
    assert not set(verdict.ranking("1.out")) & set(range(12, 24))
    assert study.pairs[0].encoder_cosine.isnan().all()
    frame = latents_frame(study)
    assert (frame["layer"][12], frame["index"][12]) == ("1", 0) and study.name_of(12) == "12 (1, 0)"
    page = page_of(make_run(model, position_names=names), heldout=heldout_text(names, **options))
    assert "0.out against 1.out" in page.headings()


@pytest.mark.usefixtures("quick_plots")
def test_a_crosscoder_of_three_models_and_two_hookpoints(make_run, make_model, heldout_text):
    names = [f"{model}/{hook}" for model in ("m0", "m1", "m2") for hook in ("h0", "h1")]
    run = make_run(make_model(3, 2), position_names=names)
    said = []
    page = page_of(run, heldout=heldout_text(names, n_models=3, n_hookpoints=2), say=said.append)
    pairs = [("m0", "m1"), ("m0", "m2"), ("m1", "m2")]
    found = [h for h in page.headings() if "against" in h]
    assert found[:3] == [f"{a} against {b}" for a, b in pairs] == [line.partition(":")[0] for line in said[-3:]]
    assert [h.partition(" to ")[2] for h in found[3:]] == [
        f"{x}, against {y}" for a, b in pairs for x, y in ((b, a), (a, b))
    ]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {"Relative decoder norm at h0", "Relative decoder norm at h1"} <= set(page.text_of["h3"])
    assert "FVU, worst position" in page.text_of["dt"]


@pytest.mark.usefixtures("quick_plots")
@pytest.mark.parametrize("missing", ["summary.json", "evaluation.json", "metrics.jsonl", "config.yaml"])
def test_a_missing_file_leaves_a_section_out(make_run, heldout_text, missing):
    run = make_run()
    (run / missing).unlink()
    page = page_of(run, heldout=heldout_text)
    assert ("Training" in page.headings()) == (missing != "metrics.jsonl")
    assert "base against tuned at blocks.1.hook_resid_post" in page.headings()


@pytest.mark.usefixtures("quick_plots")
def test_a_run_that_is_still_training_has_curves_and_says_what_is_missing(make_run, heldout_text):
    run = make_run()
    for name in ("summary.json", "evaluation.json", "final/config.json"):
        (run / name).unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "lo')
    page = page_of(run, heldout=heldout_text)
    notes = "".join(page.text_of["li"])
    assert "Latents were not looked at" in notes and "1 line(s) of metrics.jsonl" in notes
    assert page.headings()[:2] == ["Training", "Held-out reconstruction"]


@pytest.mark.usefixtures("quick_plots")
def test_loss_recovered_is_shown_where_it_was_measured(make_run, heldout_text):
    run = make_run()
    evaluation = json.loads((run / "evaluation.json").read_text())
    base, tuned = evaluation["fvu_by_position"]
    spliced = {"ce_clean": 2.5, "ce_spliced": 2.75, "ce_zero": 9.0, "kl_spliced": 0.3, "loss_recovered": 0.96}
    evaluation["loss_recovered"] = {base: spliced | {"ci95": {"loss_recovered": [0.95, 0.97]}}}
    evaluation["loss_recovered"][tuned] = spliced | {"loss_recovered": None, "ci95": None}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    page = page_of(run, heldout=heldout_text)
    cells = page.text_of["td"]
    assert cells[:8] == [base, "0.200", "80.0 %", "96.0 % (95.0–97.0)", "2.50", "2.75", "9.00", "0.300"]
    assert cells[8:12] == [tuned, "0.220", "78.0 %", "n/a"]
    tiles = dict(zip(page.text_of["dt"], page.text_of["dd"], strict=False))
    assert tiles["Loss recovered"] == "96.0 %"


@pytest.mark.usefixtures("quick_plots")
def test_what_latents_close_and_all_layers_cost_is_shown_by_group(make_run, heldout_text):
    run = make_run()
    evaluation = json.loads((run / "evaluation.json").read_text())
    group = {"n_tokens": 1200, "l0": 4.0, "fvu_by_position": evaluation["fvu_by_position"]}
    evaluation["groups"] = {"role": {"user": group, "assistant": group}}
    closed = {"share": 0.5, "share_ci95": [0.25, 0.75]}
    evaluation["closes"] = closed | {"groups": {"role": {"user": {"share": None}, "assistant": closed}}}
    layered = {"ce_clean": 2.0, "ce": {"from_clean_inputs": 2.5}, "kl": {"from_clean_inputs": 0.4}}
    evaluation["replacement_model"] = layered | {"groups": {"role": {"user": layered}}}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    page = page_of(run, heldout=heldout_text)
    cells = page.text_of["td"]
    user, assistant = (cells.index(f"role: {role}") for role in ("user", "assistant"))
    assert cells[user : user + 7] == ["role: user", "1,200", "4.00", "0.200", "0.220", "n/a", "0.400"]
    assert cells[assistant + 5 : assistant + 7] == ["50.0 % (25.0–75.0)", "n/a"]
    assert {"closes", "KL all layers, from clean inputs"} <= {*page.text_of["th"]}
    tiles = dict(zip(page.text_of["dt"], page.text_of["dd"], strict=False))
    assert tiles["Closes"] == "50.0 % (25.0–75.0)"


@pytest.mark.usefixtures("quick_plots")
def test_damaged_json_is_a_note_and_not_the_end(make_run, heldout_text):
    run = make_run()
    (run / "summary.json").write_text("{")
    assert any("summary.json" in text for text in page_of(run, heldout=heldout_text).text_of["li"])


@pytest.mark.usefixtures("quick_plots")
def test_what_is_no_run_is_an_error_and_nothing_is_written(tmp_path):
    with pytest.raises(InputError, match="is not a run directory"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick_plots")
def test_a_table_without_latents_is_an_error(make_run, tmp_path):
    with pytest.raises(InputError, match="table of latents: they were not looked at: no held-out text"):
        write_report(make_run(), latents_csv=tmp_path / "table.csv")


@pytest.mark.usefixtures("quick_plots")
def test_the_page_and_the_table_can_go_elsewhere(make_run, heldout_text, tmp_path):
    run, page, table = make_run(), tmp_path / "page.html", tmp_path / "table.csv"
    assert write_report(run, heldout=heldout_text, output=page, latents_csv=table) == page
    assert page.is_file() and not (run / "report.html").exists()
    assert len(table.read_text().splitlines()) == 1 + 24


@pytest.mark.parametrize(
    "names, pairs",
    [
        (["a/h", "b/h"], [(0, 1)]),
        (["a/g", "a/h", "b/g", "b/h"], [(0, 2), (1, 3)]),
        (["a/f", "a/g", "a/h"], [(0, 2)]),
        (["a/h"], []),
        (["a/h", "b/h", "c/h"], [(0, 1), (0, 2), (1, 2)]),
        (["a/h", "b/h", "c/h", "d/h"], [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]),
    ],
)
def test_which_positions_are_compared(names, pairs):
    assert pairs_to_compare(names) == pairs


def test_short_names_are_what_tells_two_positions_apart():
    assert short_names("a/h", "b/h") == ("a", "b")
    assert short_names("a/g", "a/h") == ("g", "h")
    assert short_names("a/g", "b/h") == ("a/g", "b/h")


def test_latents_are_spread_from_frequent_to_rare(make_model, make_heldout):
    model = make_model(n_latents=64)
    study = study_latents(model, make_heldout(sizes=(20,)), split_for("model_hookpoint_acausal"), ["a/h", "b/h"])
    chosen = spread_over_density(study.firing, 7, min_firings=2)
    counts = study.firing.counts_L[chosen].tolist()
    alive = study.firing.counts_L[study.firing.counts_L >= 2]
    assert counts == sorted(counts, reverse=True) and len(set(chosen)) == 7
    assert counts[0] == int(alive.max()) and counts[-1] == int(alive.min())


@pytest.mark.usefixtures("quick_plots")
def test_the_explorer_has_a_record_of_every_latent(make_run, heldout_text):
    run = make_run()
    folder = write_report(run, heldout=heldout_text).parent / "report"
    page = Page((folder / "index.html").read_text(encoding="utf-8"))
    assert len(page.has("script")) == 1 and not page.has("link")
    found = {}
    for path in (folder / "data").glob("*.js"):
        name, value = json.loads(f"[{path.read_text().removeprefix('crosscodeData(').removesuffix(');' + chr(10))}]")
        found[name] = value
    assert found.keys() == {"records-0", "table", "texts"}
    assert len(found["records-0"]) == len(found["table"]["search"]) == 24
    firings = next(one for one in found["table"]["columns"] if one["name"] == "firings")["values"]
    assert [sum(record["histogram"]) for record in found["records-0"]] == firings
