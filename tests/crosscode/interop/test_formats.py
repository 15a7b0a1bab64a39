"""What each format holds, and that it comes out, and back, as it was.

Axes: B tokens · X positions · D width · L latents.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from crosscode.errors import InputError
from crosscode.models import BaseCrosscoder

_spec = importlib.util.spec_from_file_location("interop_foreign", Path(__file__).with_name("foreign.py"))
foreign = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(foreign)

ACTIVATION_NAMES = ("relu", "topk", "batch_topk", "batch_topk_by_norm", "groupmax", "jumprelu")
SAES = ("sae", "sae_pre_bias", "sae_without_biases", "crosscoder_1x1")
TRANSCODERS = ("transcoder", "transcoder_pre_bias", "skip_transcoder", "clt_to_one")
CROSSCODERS = ("crosscoder_2x1", "crosscoder_2x1_pre_bias", "crosscoder_2x1_shared", "crosscoder_2x3")
NEVER = ("crosscoder_skip", "crosscoder_widths", "clt", "compound_skip", "compound_later_only")
SETS = ("set", "set_skip")
ALL = (*SAES, *TRANSCODERS, "wide_skip_transcoder", *CROSSCODERS, "compound", *SETS, *NEVER)
THRESHOLDS = ("relu", "batch_topk", "batch_topk_by_norm", "jumprelu")
HELD = {
    "saelens": {
        **dict.fromkeys(SAES, (*THRESHOLDS, "topk")),
        **dict.fromkeys((*TRANSCODERS, "wide_skip_transcoder"), THRESHOLDS),
    },
    "sparsify": dict.fromkeys((*SAES, *TRANSCODERS), ("topk", "groupmax")),
    "dictionary-learning": {
        **dict.fromkeys(SAES, (*THRESHOLDS, "topk")),
        **dict.fromkeys(CROSSCODERS, ("relu", "batch_topk", "batch_topk_by_norm")),
    },
    "kissane": dict.fromkeys(CROSSCODERS[:3], ("relu",)),
    "circuit-tracer": dict.fromkeys((*TRANSCODERS, "compound", *SETS), THRESHOLDS),
}
CASES = [(to, architecture, activation) for to in HELD for architecture in ALL for activation in ACTIVATION_NAMES]
HOLDS = [case for case in CASES if case[2] in HELD[case[0]].get(case[1], ())]
REFUSES = [case for case in CASES if case not in HOLDS]


NAMES = {"relu": "ReLU", "jumprelu": "JumpReLU", "topk": "TopK", "batch_topk": "BatchTopK", "groupmax": "GroupMax"}
ROWS = {
    "SAE": SAES[:3],
    "transcoder, also with skip": TRANSCODERS[:3],
    "crosscoder": CROSSCODERS[:1],
    "cross-layer transcoder": ("clt",),
    "compound cross-layer transcoder": ("compound",),
    "set of transcoders (`later_layers: false`)": SETS,
}


def test_the_table_in_the_docs_is_what_is_tested_here(awkward, tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "interop.md").read_text()
    lines = next(block for block in page.split("\n\n") if block.startswith("| | ")).splitlines()
    table = [line.strip("|").split("|") for line in lines if "---" not in line]
    formats, cells = [cell.strip() for cell in table[0][1:]], {row[0].strip(): row[1:] for row in table[1:]}
    assert {*formats} == HELD.keys() and cells.keys() == ROWS.keys()
    for row, kinds in ROWS.items():
        for to, cell in zip(formats, cells[row], strict=True):
            said = set(re.findall(r"\b(?:Batch|Jump)?(?:ReLU|TopK)\b|GroupMax", cell))
            for kind in kinds:
                assert said == {NAMES[a] for a in HELD[to].get(kind, ()) if a in NAMES}, (row, to)
            if row.startswith("transcoder") and said:
                assert ("one width" in cell) == ("wide_skip_transcoder" not in HELD[to])
            if row in ("SAE", "transcoder, also with skip") or said:
                continue
            model = awkward(kinds[0], "topk" if to == "sparsify" else "relu", n_layers=1).model
            try:
                held = model.export(to, tmp_path / f"{row} {to}".replace("/", " "), position="0") is not None
            except InputError:
                held = False
            assert held == cell.strip().startswith("one"), (row, to)


def assert_same(got, expected, share):
    got, expected = got.detach().double().reshape(expected.shape), expected.detach().double()
    torch.testing.assert_close(got, expected, rtol=0, atol=share * float(expected.abs().max()))


@pytest.mark.parametrize(("to", "kind", "active"), HOLDS)
def test_the_other_library_gets_our_latents_and_outputs_from_raw_activations(to, kind, active, awkward, tmp_path):
    case = awkward(kind, active)
    latents_BL, output_BXoDo = case.expected()
    assert latents_BL.count_nonzero() > 0 and not bool(latents_BL[:, 1].any() and "without" not in kind)
    folder = case.model.export(to, tmp_path / "out")
    a_BL, y = foreign.APPLY[to](folder, case.raw_BXiDi.double().reshape(40, *_dims(kind, case)))
    if kind in SETS:  # one after the other
        a_BL, y = a_BL.transpose(0, 1), y.transpose(0, 1)
    assert_same(a_BL, latents_BL, 1e-5)
    assert_same(y, output_BXoDo, 1e-5)


def _dims(kind, case):
    dims = tuple(case.raw_BXiDi.shape[1:])
    return dims[-1:] if kind == "crosscoder_1x1" else dims


@pytest.mark.parametrize("scaled", [1e-3, 1e3])
@pytest.mark.parametrize("active", ["relu", "batch_topk_by_norm"])
@pytest.mark.parametrize("kind", ["crosscoder_2x1", "crosscoder_2x3"])
def test_scaling_far_from_1_is_held_at_every_position(kind, active, scaled, awkward, tmp_path):
    case = awkward(kind, active, scaled=scaled)
    folder = case.model.export("dictionary-learning", tmp_path / "out")
    latents_BL, y_BXoDo = case.expected()
    a_BL, y_BXD = foreign.dictionary_learning(folder, case.raw_BXiDi.double())
    back = BaseCrosscoder.load(folder, backend="torch")
    back_BXD = back(case.raw_BXiDi).reshape(y_BXD.shape)
    assert_same(a_BL, latents_BL, 1e-5)
    assert_same(back.encode(case.raw_BXiDi), latents_BL, 1e-6)
    for x, expected_BD in enumerate(y_BXoDo.flatten(1, -2).unbind(1)):  # whose sizes differ by thousands
        assert_same(y_BXD[:, x], expected_BD, 1e-5)
        assert_same(back_BXD[:, x], expected_BD, 1e-6)


@pytest.mark.parametrize(("to", "kind", "active"), HOLDS)
def test_what_goes_out_comes_back(to, kind, active, awkward, tmp_path):
    case = awkward(kind, active)
    back = BaseCrosscoder.load(case.model.export(to, tmp_path / "out"), backend="torch")
    assert not back.training and back.is_folded
    raw_BXiDi = case.raw_BXiDi.reshape(40, *back.in_dims, back.d_in)
    latents_BL, output_BXoDo = case.expected()
    assert_same(back.encode(raw_BXiDi), latents_BL, 1e-6)
    assert_same(back(raw_BXiDi), output_BXoDo, 1e-6)
    assert back.metadata["hookpoints"] == case.model.metadata["hookpoints"]
    if kind not in ("crosscoder_1x1", "clt_to_one"):  # which are an SAE and a transcoder
        assert back.metadata["architecture"] == case.model.metadata["architecture"]
        assert (back.in_dims, back.out_dims) == (case.model.in_dims, case.model.out_dims)


@pytest.mark.parametrize(("kind", "active"), sorted({case[1:] for case in REFUSES}))
def test_what_a_format_cannot_hold_is_refused_and_nothing_is_written(kind, active, awkward, tmp_path):
    model = awkward(kind, active).model
    for to in [case[0] for case in REFUSES if case[1:] == (kind, active)]:
        with pytest.raises(InputError, match=rf"export --to {to}: .{{20,}}"):
            model.export(to, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("to", "kind", "active", "message"),
    [
        ("saelens", "transcoder", "topk", "no topk transcoder; `crosscode convert RUN --activation jumprelu`"),
        ("saelens", "crosscoder_2x1", "relu", "name one with --position"),
        ("saelens", "set", "relu", "of a set, by --position"),
        ("sparsify", "sae", "jumprelu", "topk and groupmax alone, not jumprelu"),
        ("dictionary-learning", "crosscoder_2x1", "topk", "`crosscode convert RUN --activation batch_topk`"),
        ("circuit-tracer", "compound_skip", "relu", "train without crosscoder.linear_skip"),
        ("circuit-tracer", "compound_later_only", "relu", "train with crosscoder.own_layer: true"),
        ("circuit-tracer", "transcoder", "topk", "convert RUN --activation jumprelu"),
    ],
)
def test_a_refusal_says_what_would_work(to, kind, active, message, awkward, tmp_path):
    with pytest.raises(InputError) as error:
        awkward(kind, active).model.export(to, tmp_path / "out")
    assert message in str(error.value)


@pytest.mark.parametrize("to", ["saelens", "circuit-tracer", "dictionary-learning"])
@pytest.mark.parametrize("active", ["batch_topk", "batch_topk_by_norm"])
def test_a_batch_topk_with_a_threshold_of_0_keeps_all_that_is_positive(to, active, awkward, tmp_path):
    case = awkward("transcoder" if to == "circuit-tracer" else "sae", active)
    case.model.activation_fn.threshold.zero_()
    latents_BL, _ = case.expected()
    assert bool(latents_BL[:, 0].any()), "the latent without decoder fires"
    back = BaseCrosscoder.load(case.model.export(to, tmp_path / "out"), backend="torch")
    assert_same(back.encode(case.raw_BXiDi), latents_BL, 1e-6)


def test_latents_that_equal_the_threshold_of_a_batch_topk_fire_in_the_other_library(awkward, tmp_path):
    case = awkward("sae", "batch_topk", scaled=False)
    smallest = case.model.encode(case.raw_BXiDi)
    case.model.activation_fn.settle_threshold_(smallest[smallest > 0].min())
    latents_BL, _ = case.expected()
    a_BL, _ = foreign.saelens(case.model.export("saelens", tmp_path / "out"), case.raw_BXiDi.double())
    assert torch.equal(a_BL > 0, latents_BL > 0)


def test_what_was_not_folded_or_not_trained_is_refused(make_case, tmp_path):
    model = make_case("sae", "batch_topk", dtype=torch.float32).model
    with pytest.raises(InputError, match="scaling of this model's activations is not folded in"):
        model.export("saelens", tmp_path / "out")
    model.fold_activation_scaling_into_weights_(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(InputError, match="no inference threshold yet"):
        model.export("saelens", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
