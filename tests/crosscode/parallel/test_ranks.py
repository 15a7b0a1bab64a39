"""Several processes do what one does; all recipes and more processes: tests/check/test_ranks.py."""

import re
import sys
from pathlib import Path

import pytest
import torch
from crosscode_kernels import DenseLatents, OpSet, SparseLatents

from crosscode.build.schema import check_config, read_yaml
from crosscode.commands.cli import command_names, main
from crosscode.errors import InputError
from crosscode.models import SAEOrTranscoder, TopkActivation
from crosscode.parallel.refusals import for_ranks
from crosscode.parallel.selection import LAST, first_of

sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))

from ranks import assert_as_one, planned_bytes, train_on

# 25 latents do not divide by 2; 7: k is larger than a shard.
RESAMPLED = '{"train": {"resample": {"every": 1, "until": 1.0, "dead_after_tokens": 8}}}'
ROW_SPARSE = '{"train": {"optimizer": {"type": "adam", "lr": 0.01, "betas": [0, 0.999], "row_sparse": true}}}'
RECIPES = (
    f"sae_topk@torch@25@{RESAMPLED}", "sae_batch_topk@reference@25", 'sae_jumprelu@torch@24@{"sparse_below": 0.5}',
    "topk_crosscoder@torch@7",
    "dedicated_feature_crosscoder@torch@25", "feb_update_diffing_topk@torch@25", f"topk_crosscoder@torch@25@{ROW_SPARSE}",
)  # fmt: skip


def test_two_processes_train_what_one_does(tmp_path):
    one, two = (train_on(n, tmp_path, "float64", RECIPES) for n in (1, 2))
    for recipe in RECIPES:
        assert_as_one(one[0][recipe], two[0][recipe], 1e-10)
        assert torch.equal(two[0][recipe]["losses"], two[1][recipe])  # both ranks know the same
        assert two[0][recipe]["bytes"] == planned_bytes(recipe, 2, "float64")


def test_the_largest_are_those_of_a_stable_sort():
    generator = torch.Generator().manual_seed(1)
    value_BC = torch.randint(0, 4, (6, 40), generator=generator)
    index_BC = torch.stack([torch.randperm(40, generator=generator) for _ in range(6)])
    for k in (1, 7, 40):
        for keys in ([value_BC, LAST - index_BC], [(value_BC << 32) | (LAST - index_BC)]):
            found = index_BC.gather(1, first_of(keys, k))
            for values, index, kept in zip(value_BC.tolist(), index_BC.tolist(), found.tolist(), strict=True):
                order = sorted(zip(values, index, strict=True), key=lambda pair: (-pair[0], pair[1]))
                assert [i for _, i in order[:k]] == kept


def test_one_process_has_the_op_set_of_its_backend_and_nothing_below_knows_of_ranks():
    model = SAEOrTranscoder(3, 3, 8, TopkActivation(2, 8), backend="torch")
    assert type(model.ops) is OpSet and type(model.ops.encode_relu(torch.ones(2, 3), torch.ones(8, 3), None)) in (
        DenseLatents,
        SparseLatents,
    )
    root = Path(__file__).parents[3]
    for folder in ("crosscode/models", "crosscode/objectives", "kernels/crosscode_kernels"):
        for file in (root / folder).rglob("*.py"):
            assert not re.search(r"torch\.distributed|crosscode\.parallel|WORLD_SIZE|all_reduce", file.read_text()), (
                file
            )


@pytest.mark.parametrize(
    ("recipe", "change", "said"),
    [
        ("sae_topk", {"train": {"compile": True}}, "train.compile = True"),
        ("sae_topk", {"device": "cuda:0"}, "device = 'cuda:0'"),
        (
            "sae_topk",
            {"language_models": [{"path": "demo:base", "device_map": "auto"}]},
            "language_models.0.device_map",
        ),
        ("sae_groupmax", {"crosscoder": {"activation": {"type": "groupmax", "k": 2}}}, "crosscoder.activation.k = 2"),
    ],
)
def test_what_cannot_be_sharded_is_refused_by_name(recipe, change, said, monkeypatch):
    values = read_yaml(recipe)
    for section, fields in change.items():
        values[section] = values[section] | fields if isinstance(fields, dict) else fields
    config = check_config(values)
    assert for_ranks(config) is config  # one process: the very same
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match=said):
        for_ranks(config)


def test_every_other_command_says_once_that_it_is_for_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in set(command_names()) - {"train", "evaluate", "harvest"}:
        monkeypatch.setenv("RANK", "0")
        assert main([name, "somewhere"]) == 2
        assert capsys.readouterr().err == (
            f"crosscode: {name}: runs in one process: start it without torchrun, which is for `crosscode train`, "
            "`evaluate`, `harvest`\n"
        )
        monkeypatch.setenv("RANK", "1")
        with pytest.raises(SystemExit, match="2"):
            main([name, "somewhere"])
        assert not any(capsys.readouterr())
