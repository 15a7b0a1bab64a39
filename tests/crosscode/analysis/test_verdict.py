"""The verdict on latents whose nature is planted, on one model beside itself, and that nothing contradicts it.

L latents · D width.
"""

import csv
import json
import math
import re
from html import unescape

import pytest
import torch

from crosscode.analysis.cards import card_groups, latent_tables
from crosscode.analysis.first_look import first_looks
from crosscode.analysis.latent_scaling import THRESHOLD
from crosscode.analysis.latents_frame import latents_frame
from crosscode.analysis.latents_pass import study_latents, with_own_text
from crosscode.analysis.records import LatentRecords
from crosscode.analysis.report import write_report
from crosscode.analysis.verdict import MIN_FIRINGS, TAGS, verdicts_on
from crosscode.analysis.wording import percent_text
from crosscode.commands.parts.closing import latents_of_b
from crosscode.errors import InputError
from crosscode.models import ModelHookpointAcausalCrosscoder, ReLUActivation
from crosscode.models.architecture import split_for

SPLIT = split_for("model_hookpoint_acausal")
NAMES = ["base/blocks.1.hook_resid_post", "tuned/blocks.1.hook_resid_post"]
D = 16
# latents by their coordinate: whose activations have it, and to whom the decoder writes it
BASE_ONLY, TUNED_ONLY, BOTH, HIDDEN, RARE, TWO_WAYS, TIED_LIKE, GREW = range(8)


def planted(make_heldout, n_tokens=1200):
    """Coordinate l is latent l; `HIDDEN` is in both models, though its decoder writes to tuned alone;
    `GREW` is another vector in base, which tuned has as well."""
    model = ModelHookpointAcausalCrosscoder(2, 1, D, 8, ReLUActivation(8), backend="torch")
    e_DD = torch.eye(D)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for latent in range(8):
            for m in (0, 1):
                if (latent, m) not in ((BASE_ONLY, 1), (TUNED_ONLY, 0), (HIDDEN, 0), (RARE, 0)):
                    model.W_dec_LXoDo[latent, m, 0] = e_DD[latent]
            model.W_enc_LXiDi[latent, 0 if latent == BASE_ONLY else 1, 0] = e_DD[latent]
        model.W_dec_LXoDo[TWO_WAYS, 0, 0] = e_DD[10]
        model.W_dec_LXoDo[GREW, :, 0] = torch.stack([1.4 * e_DD[11], e_DD[11] + 1.5 * e_DD[GREW]])
        model.b_enc_L.fill_(-0.2)
    (batch,) = make_heldout(d_model=D, sizes=(n_tokens // 11,))
    generator = torch.Generator().manual_seed(3)
    acts_HSMPD = 0.01 * batch.acts_HSMPD
    strength_HSL = torch.rand(*batch.tokens_HS.shape, 8, generator=generator) + 0.5
    fires_HSL = torch.rand(strength_HSL.shape, generator=generator) < 0.1
    fires_HSL[..., RARE] = False
    fires_HSL[:5, 1, RARE] = True
    f_HSL = strength_HSL * fires_HSL
    for latent in range(7):  # all but GREW
        for m in (0, 1):
            if (latent, m) not in ((BASE_ONLY, 1), (TUNED_ONLY, 0), (RARE, 0), (TWO_WAYS, 0)):
                acts_HSMPD[:, :, m, 0, latent] += f_HSL[..., latent]
    acts_HSMPD[:, :, 0, 0, 10] += f_HSL[..., TWO_WAYS]
    acts_HSMPD[:, :, :, 0] += f_HSL[..., None, [GREW]] * model.W_dec_LXoDo.detach()[GREW, :, 0]
    batch.acts_HSMPD = acts_HSMPD
    model.fold_activation_scaling_into_weights_(torch.ones(2, 1), torch.ones(2, 1))
    return model.eval(), [batch]


def twice_as_deep(make_heldout):
    """The same at the second of two hookpoints; at the first all latents lean to base, and no activation has them."""
    one, (batch,) = planted(make_heldout)
    model = ModelHookpointAcausalCrosscoder(2, 2, D, 8, ReLUActivation(8), backend="torch")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.W_enc_LXiDi[:, :, 1], model.W_dec_LXoDo[:, :, 1] = one.W_enc_LXiDi[:, :, 0], one.W_dec_LXoDo[:, :, 0]
        model.W_dec_LXoDo[:, :, 0] = torch.eye(D)[:8, None] * torch.tensor([0.2, 0.1])[:, None]
        model.b_enc_L.copy_(one.b_enc_L)
    batch.acts_HSMPD = torch.cat([0.01 * torch.randn_like(batch.acts_HSMPD), batch.acts_HSMPD], 3)
    model.fold_activation_scaling_into_weights_(torch.ones(2, 2), torch.ones(2, 2))
    return model.eval(), [batch], [f"{name}/blocks.{p}.hook_resid_post" for name in ("base", "tuned") for p in (0, 1)]


@pytest.fixture
def study(make_heldout):
    model, heldout = planted(make_heldout)
    return study_latents(model, heldout, SPLIT, NAMES)


def test_planted_latents_are_told_apart(study):
    (verdict,) = study.verdicts
    assert verdict.tag[BASE_ONLY] == "A-specific" and verdict.tag[TUNED_ONLY] == "B-specific"
    assert verdict.tag[BOTH] == verdict.tag[HIDDEN] == "shared"
    assert verdict.tag[RARE] == verdict.tag[TWO_WAYS] == "undecided"
    assert verdict.why[RARE] == "It fires on only 5 held-out tokens; 20 are needed."
    assert "base has it, too" in verdict.why[HIDDEN] and "of its decoder norms 100 % are tuned's" in verdict.why[HIDDEN]
    assert "in two directions (cosine 0.00)" in verdict.why[TWO_WAYS]
    assert verdict.why[TUNED_ONLY].startswith("base has less than two thirds of it: ν is error ")
    assert verdict.tag[GREW] == "B-specific" and "what it writes to base, tuned has, too (ν 0.71)" in verdict.why[GREW]
    found = "2 are specific to tuned (7, 1) and 1 is specific to base (0)"
    assert verdict.headline() == f"Of 8 latents, {found}; 3 shared and 2 undecided."
    assert verdict.specific("tuned") == [GREW, TUNED_ONLY] and verdict.specific("base") == [BASE_ONLY]
    assert RARE not in verdict.ranking("tuned")
    with pytest.raises(InputError, match="ranking: compared are 'base' and 'tuned', got 'x'"):
        verdict.ranking("x")


def test_a_partition_and_a_tie_are_said_and_prove_nothing(study):
    (table,) = study.pairs
    table.given_L2[HIDDEN] = torch.tensor([False, True])
    table.tied_L[BOTH] = True
    (verdict,) = verdicts_on([table])
    assert verdict.tag[HIDDEN] == "shared"
    assert verdict.why[HIDDEN].endswith("The partition gave it to tuned, which proves nothing.")
    assert verdict.why[BOTH].endswith("Its decoder is tied.")


def test_firing_on_what_each_model_writes_is_said(study, make_heldout):
    model, own = planted(make_heldout, n_tokens=220)
    found = with_own_text(study, model, {"base": [], "tuned": own}, SPLIT)
    rate = float(found.own_text["tuned"].density_L[TUNED_ONLY])
    said = f"It fires on 0.0 % of what base writes and {percent_text(rate)} of what tuned writes."
    assert rate > 0 and found.verdicts[0].why[TUNED_ONLY].endswith(said)
    assert latents_frame(found)["density_on_text_of_tuned"].tolist()[TUNED_ONLY] == rate


def test_a_latent_has_one_tag_over_all_hookpoints(study):
    (table,) = study.pairs
    (joined,) = verdicts_on([table, table])
    (single,) = study.verdicts
    assert joined.specific("tuned") == single.specific("tuned")
    assert joined.tag == single.tag and joined.ranking("tuned") == single.ranking("tuned")
    assert joined.why[RARE].startswith("At blocks.1.hook_resid_post: It fires")


def test_latents_of_a_compound_model_are_named_by_layer_and_number(study):
    (verdict,) = verdicts_on(study.pairs, layers=[(str(latent // 4), latent % 4) for latent in range(8)])
    assert "2 are specific to tuned (7 (1, 3), 1 (0, 1))" in verdict.headline()


@pytest.mark.parametrize("seed", range(3))
def test_of_one_model_beside_itself_nothing_is_specific(make_model, make_heldout, seed):
    """Whatever the dictionary: random weights, half of the latents written to one side only."""
    model, heldout = make_model(n_latents=64, folded=False, seed=seed), make_heldout(sizes=(150,), seed=seed)
    for batch in heldout:
        batch.acts_HSMPD[:, :, 1] = batch.acts_HSMPD[:, :, 0]
    with torch.no_grad():
        model.W_dec_LXoDo[:16, 1] = 0
        model.W_dec_LXoDo[16:32, 0] = 0
    (verdict,) = study_latents(model, heldout, SPLIT, NAMES).verdicts
    assert int((verdict.tables[0].firings >= MIN_FIRINGS).sum()) > 48
    assert not verdict.specific("base") and not verdict.specific("tuned")
    assert verdict.headline().startswith("No difference found: of ")


@pytest.mark.usefixtures("quick_plots")
@pytest.mark.parametrize("n_hookpoints", [1, 2])
def test_nothing_contradicts_the_verdict(make_run, heldout_text, make_heldout, tmp_path, n_hookpoints):
    """What is said while it is made, the page, its cards and table, the explorer's data and the CSV."""
    model, batches, names = (*planted(make_heldout), NAMES) if n_hookpoints == 1 else twice_as_deep(make_heldout)
    text = heldout_text()
    heldout = type(text)(batches, text.tokenizer, text.split, names)
    study = study_latents(model, batches, SPLIT, names)
    (verdict,) = study.verdicts
    found = {tag: [latent for latent in range(8) if verdict.tag[latent] == tag] for tag in TAGS}
    assert found["B-specific"] == [TUNED_ONLY, GREW] and found["A-specific"] == [BASE_ONLY]
    said = []
    run = make_run(model, position_names=names)
    page = write_report(run, heldout=lambda: heldout, latents_csv=tmp_path / "t.csv", say=said.append)
    index = page.parent / "report" / "index.html"
    for html in (page.read_text(encoding="utf-8"), index.read_text(encoding="utf-8")):
        assert all(line in unescape(html) for line in said)
        assert not re.search(r"\b(base|tuned)[ -]only\b|only in (base|tuned)", html)
        counts = re.findall(r"</span>([^<>]+): <b>(\d+)</b>", html)
        assert dict(counts) == {verdict.name_of(tag): str(len(found[tag])) for tag in TAGS if tag != "structural"}
    assert said[0] == (
        "tuned has something of its own. 2 of 8 learned features (latents) are specific to it: "
        "base has less than two thirds of each. The first:"
    )
    assert said[-1] == verdict.headline()
    assert [line.split()[1] for line in said[1:-1]] == [str(latent) for latent in verdict.specific("tuned")]
    groups = card_groups(study, text.tokenizer)
    assert [(group.heading, [card.latent for card in group.cards]) for group in groups] == [
        ("Most specific to tuned", verdict.specific("tuned")),
        ("Most specific to base", verdict.specific("base")),
    ]
    for card in (card for group in groups for card in group.cards):
        assert (card.tag, card.why) == (verdict.names[card.latent], verdict.why[card.latent])
        facts = {
            key: float(value.replace("–", "nan"))
            for key, value in card.facts
            if key not in ("active on", "largest activation")
        }
        assert (facts["relative norm"] > 0.5) == (card.latent in found["B-specific"])
        assert all(facts[f"ν {kind}"] < THRESHOLD for kind in ("error", "reconstruction", "activations"))
    (table,) = latent_tables(study)
    titles = [column.title for column in table.columns]
    for row in table.rows:
        latent, lean = int(row[0][1] or 0), row[titles.index("relative norm")][1]
        assert row[1][0] == verdict.names[latent]
        assert (latent in verdict.ranking("tuned")) == (lean > 0.5)
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    explorer = (page.parent / "report" / "data" / "table.js").read_text(encoding="utf-8")
    columns = json.loads(re.sub(r"^crosscodeData\(\"table\",|\);\n$", "", explorer))["columns"]
    columns = {one["name"]: one["values"] for one in columns}
    assert [row["tag"] for row in rows] == columns["tag"] == verdict.names
    assert [row["why"] for row in rows] == columns["why"] == list(verdict.why)
    for name, tag in (("tuned", "B-specific"), ("base", "A-specific")):
        ranks = columns[f"rank_{name}"]
        assert sorted(ranks[latent] for latent in found[tag]) == [*range(1, len(found[tag]) + 1)]
        assert [float(row[f"rank_{name}"] or "nan") for row in rows] == pytest.approx(
            [math.nan if rank is None else rank for rank in ranks], nan_ok=True
        )
    assert latents_of_b(study.verdicts, "base", "tuned") == verdict.specific("tuned")


def test_text_that_specific_latents_have_in_common_is_named(make_heldout):
    """Its first and last tokens, too, that no single example has together."""
    model, (batch,) = planted(make_heldout)
    sentence = torch.arange(40, 67)
    batch.tokens_HS = torch.randint(100, 300, (40, 60), generator=torch.Generator().manual_seed(0))
    batch.tokens_HS[::2, 20:47] = sentence
    batch.mask_HS = torch.ones(40, 60, dtype=torch.bool)
    batch.acts_HSMPD = 0.01 * torch.randn(40, 60, 2, 1, D)
    batch.acts_HSMPD[::2, 21, 1, 0, TUNED_ONLY] += 1
    batch.acts_HSMPD[::2, 45, 1, 0, GREW] += 1.5
    batch.acts_HSMPD[::2, 45, :, 0, 11] += torch.tensor([1.4, 1])
    study = study_latents(model, [batch], SPLIT, NAMES)
    assert study.verdicts[0].specific("tuned") == [GREW, TUNED_ONLY]
    (look,) = first_looks(study, LatentRecords(*[None] * 4), None)
    heading = look.heading
    text = "".join(f"[{token}]" for token in sentence.tolist())
    assert heading.endswith(f"two thirds of each. Most of them fire most around “{text}”. The first:")
