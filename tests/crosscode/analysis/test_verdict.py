"""The verdict on latents whose nature is planted, on one model beside itself, and that nothing contradicts it.

L latents · D width.
"""

import csv
import json
import re

import pytest
import torch

from crosscode.analysis.cards import card_groups, latent_table
from crosscode.analysis.latent_plots import pair_section
from crosscode.analysis.latents_frame import latents_frame
from crosscode.analysis.latents_pass import study_latents, with_own_text
from crosscode.analysis.report import write_report
from crosscode.analysis.verdict import MIN_FIRINGS, TAGS, verdicts_on
from crosscode.analysis.wording import percent_text
from crosscode.errors import InputError
from crosscode.models import ModelHookpointAcausalCrosscoder, ReLUActivation
from crosscode.models.architecture import split_for

SPLIT = split_for("model_hookpoint_acausal")
NAMES = ["base/blocks.1.hook_resid_post", "tuned/blocks.1.hook_resid_post"]
D = 16
# latents by their coordinate: whose activations have it, and to whom the decoder writes it
BASE_ONLY, TUNED_ONLY, BOTH, HIDDEN, RARE, TWO_WAYS, TIED_LIKE, GREW = range(8)


def planted(make_heldout, n_tokens=1200, **weights):
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
    assert verdict.why[TUNED_ONLY].startswith("base has less than half of it: ν is error ")
    assert verdict.tag[GREW] == "B-specific" and "what it writes to base, tuned has, too (ν 0.71)" in verdict.why[GREW]
    found = "2 are specific to tuned (7, 1) and 1 is specific to base (0)"
    assert verdict.headline() == f"Of 8 latents, {found}; 3 are shared."
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
def test_nothing_contradicts_the_verdict(make_run, heldout_text, make_heldout, tmp_path):
    """The page, its cards and table, the explorer's data and the CSV."""
    model, batches = planted(make_heldout)
    text = heldout_text()
    heldout = type(text)(batches, text.tokenizer, text.split, NAMES)
    study = study_latents(model, batches, SPLIT, NAMES)
    (verdict,) = study.verdicts
    page = write_report(make_run(model), heldout=lambda: heldout, latents_csv=tmp_path / "t.csv")
    html = page.read_text(encoding="utf-8")
    assert verdict.headline() in html
    assert "2 of 8 latents are specific to tuned: base has less than half of each. The first:" in html
    section = pair_section(verdict)
    assert {tag: n for _, tag, n, _ in section.counts} == {
        verdict.name_of(tag): verdict.counts[tag] for tag in TAGS if tag != "structural"
    }
    for group in card_groups(study, text.tokenizer):
        assert all(
            card.tag == verdict.names[card.latent] and card.why == verdict.why[card.latent] for card in group.cards
        )
    assert all(row[1][0] == verdict.names[int(row[0][1] or 0)] for row in latent_table(study).rows)
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    frame = latents_frame(study)
    assert [row["tag"] for row in rows] == frame["tag"].tolist() == verdict.names
    explorer = (page.parent / "report" / "data" / "table.js").read_text(encoding="utf-8")
    found = json.loads(re.sub(r"^crosscodeData\(\"table\",|\);\n$", "", explorer))
    columns = {one["name"]: one["values"] for one in found["columns"]}
    assert columns["tag"] == verdict.names and columns["why"] == list(verdict.why)
    assert not re.search(r"\b(base|tuned)[ -]only\b", html.replace("only in", ""))
