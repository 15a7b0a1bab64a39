"""Training finds what was planted."""

from __future__ import annotations

import json
import signal

import pytest
import torch

from crosscode.commands.cli import main
from crosscode.errors import InputError
from crosscode.models import BaseCrosscoder
from crosscode.synthetic.planted import PlantedConfig
from crosscode.synthetic.runs import SyntheticConfig, markdown_table, next_penalty, run_synthetic
from crosscode.synthetic.scheme import SyntheticScheme
from crosscode.synthetic.schemes import SCHEMES

SMALL = PlantedConfig(n_features=24, n_exclusive=8, d_model=8, mean_active=2)
SMALL_OPTIONS = [
    "--planted.n_features", "24", "--planted.n_exclusive", "8", "--planted.d_model", "8", "--planted.mean_active", "2",
    "--n_steps", "5", "--batch_size", "64", "--n_heldout_tokens", "100",
]  # fmt: skip


def small(scheme, **changes):
    options = {"planted": SMALL, "n_steps": 8, "batch_size": 64, "n_heldout_tokens": 100} | changes
    return SyntheticConfig(schemes=[scheme], **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "seed"),
    [("topk_crosscoder", 0), ("batch_topk_crosscoder", 4), ("jan_update_crosscoder", 0), ("jan_update_crosscoder", 3)],
)
def test_256_planted_features_are_recovered_and_exclusive_ones_told_apart(scheme, seed):
    torch.set_num_threads(1)
    planted = PlantedConfig(seed=100 + seed if seed else 0)
    config = SyntheticConfig(schemes=[scheme], seed=seed, planted=planted)
    assert (config.planted.n_features, config.planted.n_exclusive, config.planted.d_model) == (256, 64, 64)
    (result,) = run_synthetic(config)
    truth = result.ground_truth
    assert truth.all.matched_cosine >= 0.95
    assert truth.shared.matched_cosine >= 0.95 and truth.exclusive.matched_cosine >= 0.95
    assert truth.precision >= 0.95 and truth.recall >= 0.95


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_every_scheme_runs_and_reports(scheme):
    planted = SMALL.model_copy(update={"n_hookpoints": 2, "correlation": 0.3})
    (result,) = run_synthetic(small(scheme, planted=planted))
    assert result.scheme == scheme and result.ground_truth.all.n_features == 24
    assert 0 <= result.fvu < 3 and result.l0 >= 0
    assert (result.penalty is not None) == ("l1" in scheme or "jan" in scheme or "jumprelu" in scheme)
    row = markdown_table([result]).splitlines()[-1]
    assert row.startswith(f"| {scheme} |") and row.count("|") == 11


def test_latents_of_one_model_are_those_that_both_models_do_not_share():
    config = SyntheticConfig(planted=PlantedConfig(n_features=64, n_exclusive=16), l0=4)  # 80 latents
    dedicated = SyntheticScheme.of(config, "dedicated_feature_crosscoder").model((2, 1, 16), "torch")
    tied = SyntheticScheme.of(config, "feb_update_diffing_topk").model((2, 1, 16), "torch")
    assert dedicated.partition.models_LM().sum(0).tolist() == [70, 70] and tied.n_shared_latents == 60


def test_the_same_seed_gives_the_same_table():
    first, second = (next(run_synthetic(small("topk_crosscoder"))) for _ in range(2))
    assert (first.fvu, repr(first.ground_truth)) == (second.fvu, repr(second.ground_truth))
    other = next(run_synthetic(small("topk_crosscoder", seed=1)))
    assert other.fvu != first.fvu


def test_topk_styles_keep_as_many_latents_as_wanted():
    (result,) = run_synthetic(small("topk_crosscoder", l0=3, n_latents=30))
    assert 2 < result.l0 <= 3


def test_the_penalty_is_searched_for_until_the_l0_is_as_wanted():
    options = {"n_steps": 60, "n_heldout_tokens": 4096, "l0": 4}
    single = next(run_synthetic(small("l1_crosscoder", **options)))
    assert single.penalty == 1.0 and single.n_runs == 1
    searched = next(run_synthetic(small("l1_crosscoder", **options, max_runs=8)))
    assert searched.l0 == pytest.approx(4, rel=0.1) and searched.penalty != 1.0
    assert abs(searched.l0 - 4) < abs(single.l0 - 4) and 1 < searched.n_runs <= 8


@pytest.mark.parametrize("wanted", [0.5, 3.0, 40.0])
def test_the_search_for_a_penalty_ends_where_l0_is_as_wanted(wanted):
    def l0(penalty):
        return 20.0 / (0.3 + penalty**1.7)

    runs = [(1.0, l0(1.0))]
    for _ in range(12):
        penalty = next_penalty(runs, wanted)
        runs.append((penalty, l0(penalty)))
    assert min(abs(found / wanted - 1) for _, found in runs) < 0.02


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: SyntheticConfig(schemes=["top_k"]), "schemes: unknown scheme 'top_k'; available: l1_crosscoder"),
        (lambda: small("topk_crosscoder", n_latents=20), "n_latents = 20: at least one for each of the 24 planted"),
        (lambda: small("groupmax_crosscoder", l0=5, n_latents=24), "k = 5: GroupMax needs a k that divides"),
        (lambda: small("topk_crosscoder", backend="triton"), "backend 'triton' is not available on cpu"),
        (lambda: small("topk_crosscoder", device="tpu7"), "device = 'tpu7': not available here"),
        (
            lambda: small("feb_update_diffing_topk", planted=SMALL.model_copy(update={"n_models": 3})),
            "shared latents need n_models = 2, got 3",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_runs(config, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match=message):
        run_synthetic(config())


def test_the_command_prints_the_table_and_writes_json(tmp_path, capsys):
    file = tmp_path / "figures.json"
    command = ["synthetic", "topk_crosscoder", "jan_update_crosscoder", *SMALL_OPTIONS, "--json", str(file)]
    assert main([*command, "--planted.n_models", "1", "--planted.n_exclusive", "0"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["topk_crosscoder", "jan_update_crosscoder"]
    figures = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert figures["config"]["planted"]["n_features"] == 24 and len(figures["schemes"]) == 2
    truth = figures["schemes"][0]["ground_truth"]
    assert truth["all"]["n_features"] == 24 and truth["recall"] is None and truth["exclusive"] is None


def test_an_interrupted_scheme_does_not_promise_that_it_can_go_on(monkeypatch, capfd):
    def interrupt(model, step, n_steps):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(BaseCrosscoder, "before_step", interrupt)
    assert main(["synthetic", "topk_crosscoder", *SMALL_OPTIONS]) == 143
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == "crosscode: stopped by SIGTERM"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["topk"], ["schemes", "'topk'", "topk_crosscoder"]),
        (["topk_crosscoder", "--n_step", "3"], ["--n_step;", "--n_steps"]),
        (["topk_crosscoder", "--n_steps", "many"], ["n_steps", "'many'", "integer"]),
        (["topk_crosscoder", "--planted.correlation", "1"], ["planted.correlation", "less than 1"]),
        (["topk_crosscoder", "--planted.n_models", "1"], ["planted.n_exclusive = 64", "planted.n_models >= 2"]),
        (["topk_crosscoder", "--json", "/nowhere/x.json"], ["--json", "/nowhere", "no such folder"]),
    ],
)
def test_bad_input_of_the_command_is_one_line(arguments, expected, capfd):
    assert main(["synthetic", *arguments]) == 2
    shown = capfd.readouterr()
    assert shown.out == "" and len(shown.err.strip().splitlines()) == 1, shown.err
    assert all(text in shown.err for text in expected), shown.err


def test_the_help_of_the_command_names_schemes_and_fields(capsys):
    assert main(["synthetic", "--help"]) == 0
    assert main(["synthetic", "--help", "planted"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("feb_update_diffing_jumprelu", "--planted.zipf_exponent float", "--json FILE", "--max_runs int"):
        assert text in shown


def test_lr_norm_and_scale_at_the_start_are_those_of_every_scheme_that_has_them():
    plain = SyntheticConfig(planted=PlantedConfig(n_features=64))
    given = plain.model_copy(update={"lr": 1e-3, "dec_init_norm": 0.6, "encoder_scale": 0.8, "own_scale": 1.5})
    for name in SCHEMES:
        own, told = (
            SyntheticScheme.of(SyntheticConfig(planted=PlantedConfig(n_features=64)), name),
            SyntheticScheme.of(given, name),
        )
        assert own.train_config(given).optimizer.lr > told.train_config(given).optimizer.lr == 1e-3
        model = told.model((2, 1, 16), "torch")
        if "jumprelu" not in own.parts["activation"]["type"]:
            model.init_weights(told.init(), 0)
            belongs_LM = torch.ones(model.n_latents, 2) if model.partition is None else model.partition.models_LM()
            expected_LM = 0.6 * belongs_LM.float()
            if model.n_shared_latents:
                expected_LM[model.n_shared_latents :] *= 1.5
            torch.testing.assert_close(model.W_dec_LXoDo.norm(dim=-1), expected_LM[..., None])
        else:
            own_first, told_first = (scheme.parts["init"].get("first", scheme.parts["init"]) for scheme in (own, told))
            assert told_first == own_first | {"encoder_scale": 0.8}
