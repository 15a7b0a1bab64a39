"""Language models that ranks hold together, or apart, give what one process gives; stores of single models, joined, too."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from crosscode.build.schema import check_config
from crosscode.commands.cli import main
from crosscode.errors import InputError
from crosscode.parallel.refusals import check_harvest, for_ranks
from crosscode.parallel.teams import Teams

sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))

import ranks
import split_models


@pytest.fixture
def folder(tmp_path, tiny_config, tiny_lms):
    """Tiny models that two processes can hold together, and a config of two of them."""
    from transformers import AutoTokenizer

    for seed, name in enumerate((*split_models.KINDS, "second")):
        split_models.save_model("llama" if name == "second" else name, tmp_path / name, seed)
        AutoTokenizer.from_pretrained(tiny_lms[0]).save_pretrained(tmp_path / name)
    values = tiny_config | {"language_models": [{"path": str(tmp_path / name)} for name in ("llama", "second")]}
    values |= {"hookpoints": ["blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"]}
    values["data"] |= {"harvest_batch_size": 7}  # divides by no number of processes
    values["train"] |= {"log_every": 1}
    values["evaluation"] = {"n_tokens": 200, "loss_recovered_n_tokens": 100}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def train(folder: Path, name: str, *options: str) -> str:
    return ",".join(["train", str(folder / "c.yaml"), "--run_dir", str(folder / name), *options])


def spawned(n_ranks: int, folder: Path, *runs: str) -> list[str]:
    words = [sys.executable, split_models.__file__, str(folder), *runs]
    return ranks.finish(ranks.spawn(n_ranks, words=words), timeout=900)


def figures(run: Path) -> list[float]:
    """Losses of all steps, and what the evaluation found."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluation = json.loads((run / "evaluation.json").read_text())
    found = [row["loss"] for row in rows if "loss" in row]
    assert len(found) == 10
    for name in ("fvu_by_position", "loss_recovered"):
        for place in sorted(evaluation[name]):
            value = evaluation[name][place]
            found += (
                [value[part] for part in ("ce_clean", "ce_spliced", "ce_zero")] if isinstance(value, dict) else [value]
            )
    return found


def test_two_processes_that_hold_models_together_or_apart_do_what_one_does(folder):
    assert main(train(folder, "one").split(",")) == 0
    runs = train(folder, "together", "--parallel.model", "2"), train(folder, "apart", "--parallel.apart", "true")
    said = spawned(2, folder, "check:2", *runs)
    print(said[0])
    one = figures(folder / "one")
    assert len(one) == 10 + 4 + 3 * 6
    for name in ("together", "apart"):
        assert figures(folder / name) == pytest.approx(one, rel=1e-4, abs=1e-5)


@pytest.mark.soak
def test_four_processes_hold_models_together_and_apart_and_harvest_stores_that_are_joined(folder):
    assert main(train(folder, "one").split(",")) == 0
    harvest = [
        ",".join(["harvest", str(folder / "c.yaml"), "--models", str(m), "--store", str(folder / f"s{m}"),
                  "--n-tokens", "640", "--parallel.model", "2"])
        for m in range(2)
    ]  # fmt: skip
    spawned(
        4, folder, *harvest, train(folder, "both", "--parallel.model", "2", "--parallel.apart", "true"),
        train(folder, "together", "--parallel.model", "2"),
    )  # fmt: skip
    for name in ("both", "together"):
        assert figures(folder / name) == pytest.approx(figures(folder / "one"), rel=1e-4, abs=1e-5)
    joined = json.dumps([str(folder / f"s{m}") for m in range(2)])
    words = ["train", str(folder / "c.yaml"), "--data.join", joined]
    assert main([*words, "--run_dir", str(folder / "joined-one")]) == 0
    command = "import sys; from crosscode.commands.cli import main; sys.exit(main(sys.argv[1:]))"
    several = [sys.executable, "-c", command, *words, "--run_dir", str(folder / "joined-two")]
    ranks.finish(ranks.spawn(2, words=several), timeout=900)
    assert figures(folder / "joined-two") == pytest.approx(figures(folder / "joined-one"), rel=1e-4, abs=1e-5)


@pytest.mark.soak
def test_models_of_other_width_and_tokenizer_are_held_apart_and_documents_isolated(
    tmp_path, tiny_config, tiny_lms, letters_lm
):
    values = tiny_config | {"language_models": [{"path": tiny_lms[0]}, {"path": letters_lm}]}
    values["data"] |= {"harvest_batch_size": 7, "isolate_documents": True}
    values["train"] |= {"log_every": 1}
    values["evaluation"] = {"n_tokens": 200, "loss_recovered_n_tokens": 100}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    assert main(train(tmp_path, "one").split(",")) == 0
    spawned(2, tmp_path, train(tmp_path, "apart", "--parallel.apart", "true"))
    assert figures(tmp_path / "apart") == pytest.approx(figures(tmp_path / "one"), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("size", "apart", "n_ranks"), [(1, False, 3), (2, False, 4), (1, True, 4), (2, True, 8), (4, False, 4)]
)
def test_the_shares_of_all_ranks_are_all_sequences_once(size, apart, n_ranks):
    for n_sequences in (0, 1, 7, 16):
        given = []
        for rank in range(n_ranks):
            teams = Teams(SimpleNamespace(rank=rank, size=n_ranks), 2, size, apart)  # pyright: ignore[reportArgumentType]
            share, run = teams.share(n_sequences), teams.run(n_sequences)
            assert run.start <= share.start <= share.stop <= run.stop
            given += [(m, i) for m in range(2) if teams.holds(m) for i in range(n_sequences)[share]]
        assert sorted(given) == [(m, i) for m in range(2) for i in range(n_sequences)]


@pytest.mark.parametrize(
    ("change", "n_ranks", "said"),
    [
        ({"parallel": {"model": 2}}, 1, "parallel.model = 2: must divide the number of processes, 1"),
        ({"parallel": {"model": 4}}, 6, "parallel.model = 4: must divide"),
        ({"parallel": {"apart": True}}, 3, "parallel.apart = True: 2 language models"),
        ({"parallel": {"model": 2}, "data.cache": {"path": "x"}}, 2, "data.cache.path = 'x'"),
        ({"parallel": {"model": 2}, "lm": {"adapter": "a/b"}}, 2, "language_models.0.adapter = 'a/b'"),
        (
            {"parallel": {"model": 2}, "lm": {"quantization": {"load_in_4bit": True}}},
            2,
            "language_models.0.quantization",
        ),
        ({"parallel": {"apart": True}, "lm": {"path": "x.gguf"}}, 2, "a GGUF file"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(tiny_config, monkeypatch, change, n_ranks, said):
    tiny_config["parallel"] = change["parallel"]
    tiny_config["data"] |= {"cache": change["data.cache"]} if "data.cache" in change else {}
    tiny_config["language_models"][0] |= change.get("lm", {})
    config = check_config(tiny_config)
    monkeypatch.setenv("WORLD_SIZE", str(n_ranks))
    with pytest.raises(InputError, match=said.replace(".", r"\.")):
        for_ranks(config)
    if "data.cache" not in change:
        with pytest.raises(InputError, match=said.replace(".", r"\.")):
            check_harvest(config)
