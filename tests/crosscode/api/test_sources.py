"""Every form in which activations may come gives the same run."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

import crosscode
from crosscode.commands.cli import main
from crosscode.data.arrays.opening import open_input
from crosscode.data.arrays.rows import Arrays
from crosscode.errors import InputError

CROSSCODER = {"n_latents": 24, "activation": {"type": "topk", "k": 3}}


def losses(run):
    return [row["loss"] for row in run.metrics if "loss" in row]


def as_memory_map(acts, folder):
    made = np.memmap(folder / "acts.bin", dtype=np.float32, mode="w+", shape=tuple(acts.shape))
    made[:] = acts.numpy()
    made.flush()
    return np.memmap(folder / "acts.bin", dtype=np.float32, mode="r", shape=tuple(acts.shape))


def as_npy(acts, folder):
    np.save(folder / "acts.npy", acts.numpy())
    return folder / "acts.npy"


def as_safetensors(acts, folder):
    save_file({"acts": acts, "ids": torch.arange(3)}, folder / "acts.safetensors")
    return str(folder / "acts.safetensors")


RANDOM_ACCESS = {
    "array": lambda acts, folder: acts.numpy(),
    "memory map": as_memory_map,
    "npy": as_npy,
    "safetensors": as_safetensors,
    "list of one": lambda acts, folder: [acts],
}


@pytest.mark.parametrize("form", RANDOM_ACCESS)
def test_forms_with_random_access_give_the_losses_of_a_tensor(form, acts, train, tmp_path):
    given = RANDOM_ACCESS[form](acts, tmp_path)
    assert losses(train(given)) == losses(train(acts, name="tensor"))


def as_parquet(acts, folder):
    table = pa.table({"row": pa.array(range(len(acts))), "acts": pa.array(list(acts.numpy()), pa.list_(pa.float32()))})
    pq.write_table(table, folder / "acts.parquet", row_group_size=50)
    return folder / "acts.parquet"


IN_ORDER = {
    "iterator": lambda acts, folder: iter(acts.split(100)),
    "generator of arrays": lambda acts, folder: (part.numpy() for part in acts.split(90)),
    "list-like": lambda acts, folder: _Again(acts.split(100)),
    "DataLoader": lambda acts, folder: DataLoader(TensorDataset(acts), batch_size=100),
    "parquet": as_parquet,
}


class _Again:
    def __init__(self, parts):
        self.parts = parts

    def __iter__(self):
        return iter(self.parts)


@pytest.mark.parametrize("form", IN_ORDER)
def test_forms_in_order_train_and_are_evaluated(form, acts, train, tmp_path):
    run = train(IN_ORDER[form](acts, tmp_path), n_tokens=512, data={"shuffle_buffer_size": 64})
    assert run.summary["step"] == 8 and run.summary["figures_from"] == "held-out data"
    assert (run.path / "final" / "model.safetensors").is_file()
    assert run.evaluate().fvu == pytest.approx(run.summary["fvu"], rel=1e-6)


def chunked(one, acts):
    return (
        torch.cat(list(one)) if isinstance(one, list) else torch.cat(list(Arrays([one], 1, 1).chunks(0, None)))[:, 0, 0]
    )


@pytest.mark.parametrize("form", [*RANDOM_ACCESS, *IN_ORDER])
def test_rows_are_those_that_were_given(form, acts, tmp_path):
    given = {**RANDOM_ACCESS, **IN_ORDER}[form](acts, tmp_path)
    one = open_input(given[0] if isinstance(given, list) else given)
    assert torch.equal(chunked(one, acts), acts)


@pytest.mark.parametrize("form", ["list-like", "parquet"])
def test_a_part_of_the_rows(form, acts, tmp_path):
    one = open_input(IN_ORDER[form](acts, tmp_path))
    assert torch.equal(torch.cat(list(one.chunks(37, 290))), acts[37:290])


def test_a_parquet_file_of_one_row_group_is_not_read_whole(tmp_path):
    values = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32)
    rows = pa.FixedSizeListArray.from_arrays(values, 128)
    pq.write_table(pa.table({"acts": rows}), tmp_path / "acts.parquet", row_group_size=len(rows))
    del rows
    before = pa.total_allocated_bytes()
    for chunk in open_input(tmp_path / "acts.parquet").chunks():
        assert pa.total_allocated_bytes() - before < values.nbytes / 2
        assert chunk.shape[1:] == (128,)


def test_rows_of_an_iterator_come_once(acts):
    one = open_input(iter(acts.split(100)))
    first = torch.cat(list(one.chunks(0, 130)))
    sampled = torch.cat([next(one.sample(130)), *[]])
    rest = torch.cat(list(one.chunks(130)))
    assert torch.equal(first, acts[:130]) and torch.equal(sampled, acts[130:200]) and torch.equal(rest, acts[130:])


def test_bfloat16_files_and_float64_arrays_are_read(acts, train, tmp_path):
    save_file({"acts": acts.bfloat16()}, tmp_path / "acts.safetensors")
    assert train(tmp_path / "acts.safetensors", name="a").summary["step"] == 10
    assert train(acts.double().numpy(), name="b").summary["step"] == 10


def test_a_store_is_a_source(acts, train, tmp_path, tiny_config):
    config = {name: tiny_config[name] for name in ("language_models", "hookpoints", "data")}
    file = tmp_path / "harvest.json"
    file.write_text(json.dumps(config))
    assert main(["harvest", str(file), "--store", str(tmp_path / "store"), "--n_tokens", "600"]) == 0
    store = crosscode.ActivationCache(tmp_path / "store")
    names = ["one/mid", "two/mid"]
    run = train(store, CROSSCODER, names=names)
    assert list(run.summary["fvu_by_position"]) == names
    assert losses(train(tmp_path / "store", CROSSCODER, name="path", names=names)) == losses(run)


def test_positions_in_every_arrangement(acts, train):
    acts_NPD = torch.stack([acts, acts.flip(0)], dim=1)
    flat = train(acts_NPD, CROSSCODER, name="a", names=["one/x", "two/x"])
    full = train(acts_NPD[:, :, None], CROSSCODER, name="b", names=["one/x", "two/x"])
    listed = train([acts, acts.flip(0)], CROSSCODER, name="c", names=["one/x", "two/x"])
    assert losses(flat) == losses(full) == losses(listed)
    assert flat.model.in_dims == (2, 1)
    layers = train(acts_NPD, CROSSCODER, name="d")
    assert layers.model.in_dims == (1, 2)
    transcoder = train([acts, acts.flip(0)], {**CROSSCODER, "type": "transcoder"}, name="e")
    assert transcoder.model.position_names == ("position 1",)


def test_held_out_rows_are_the_last_ones_or_those_that_are_given(acts, train):
    run = train(acts, data={"validation_fraction": 0.1})
    assert run.evaluate().n_tokens == 60
    assert torch.equal(torch.cat([b.usable() for b in run.experiment.heldout_batches()])[:, 0, 0], acts[540:])
    other = train(acts, name="other", heldout=acts[:100] * 2)
    assert torch.equal(torch.cat([b.usable() for b in other.experiment.heldout_batches()])[:, 0, 0], acts[:100] * 2)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (torch.zeros(600, 8, dtype=torch.int64), {}, "acts: a tensor of torch.int64"),
        (3, {}, "acts: int: must be a tensor, array"),
        ("nowhere.npy", {}, "'nowhere.npy': no such file"),
        (torch.zeros(600, 2, 8), {}, "crosscoder.type = 'sae': reads and reconstructs exactly one hookpoint"),
        ([torch.zeros(600, 8), torch.zeros(500, 8)], {"crosscoder": CROSSCODER}, "acts: rows: 500 of a tensor"),
        (torch.zeros(600, 8), {"names": ["a", "b"]}, "names: 2 were given ('a', 'b'), but acts have 1 position"),
        (torch.zeros(600, 8), {"tokens": torch.arange(5)}, "tokens: (5,) of torch.int64"),
        (torch.zeros(600, 8), {"tokenizer": object()}, "tokenizer: is for tokens"),
        (
            torch.zeros(600, 8),
            {"tokenizer": object(), "tokens": torch.arange(600)},
            "tokenizer: object: must be one of",
        ),
        (torch.zeros(600, 8), {"tokenizer": "no/where at all", "tokens": torch.arange(600)}, "cannot be loaded"),
        (torch.zeros(600, 8), {"tokens": torch.arange(600) - 1}, "tokens: holds -1"),
        (torch.zeros(600, 8), {"data": {"stores": ["acts"]}}, "data.stores = ['acts']: is for runs that harvest"),
        (torch.zeros(600, 8), {"data": {"source": {"type": "demo"}}}, "data.source = "),
        (torch.zeros(600, 8), {"loggers": [3]}, "loggers: 3: must be an object of crosscode.Logger"),
        (torch.zeros(600, 8).to_sparse(), {}, "lies in torch.sparse_coo; give it as `.to_dense()`"),
        (torch.zeros(600, 8, device="meta"), {}, "has no values"),
        (torch.zeros(600, 8).to(torch.float8_e5m2), {}, "acts: a tensor of torch.float8_e5m2"),
        (torch.tensor(1.0), {}, "acts: a tensor in memory (): shape ()"),
        (torch.zeros(60, 1, 1, 2, 8), {}, "shape (60, 1, 1, 2, 8): rows of activations are wanted"),
        (torch.zeros(0, 8), {}, "holds 0 row(s): at least 2 are needed"),
        (iter([torch.zeros(600, 8)]), {"n_tokens": None}, "n_tokens: required, but not given"),
        (iter([]), {}, "acts: batches of list_iterator: the first batch is missing"),
        (iter([torch.zeros(8)]), {}, "acts: batches of list_iterator: one is (8,) of torch.float32"),
        (torch.zeros(1, 8), {}, "at least 2 are needed"),
    ],
)
def test_bad_activations_are_refused_and_nothing_is_written(data, options, message, train, tmp_path):
    with pytest.raises(InputError) as error:
        train(data, **options)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: save_file({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, f / "x.safetensors"), "name one tensor"),
        (lambda f: (f / "x.safetensors").write_bytes(b"nonsense, and long enough"), "is no safetensors file"),
        (lambda f: (f / "x.npy").write_bytes(b"nonsense"), "is no npy file of numbers"),
        (lambda f: (f / "x.txt").write_text("1 2"), "must end in one of .safetensors, .npy, .parquet"),
        (lambda f: np.save(f / "x.npy", np.asfortranarray(np.ones((4, 3)))), "lies in Fortran order"),
        (lambda f: np.save(f / "x.npy", np.ones((4, 3), dtype=np.int32)), "activations must be one of float64"),
        (lambda f: np.save(f / "x.npy", np.ones((4, 3), dtype=">f4")), "in this machine's byte order"),
        (lambda f: pq.write_table(pa.table({"n": [1, 2]}), f / "x.parquet"), "name one column of lists of numbers"),
        (lambda f: pq.write_table(pa.table({"n": [[1.0], [2.0, 3.0], [4.0, 5.0, 6.0]]}), f / "x.parquet"), None),
    ],
)
def test_bad_files_are_refused_by_name(make, message, tmp_path):
    make(tmp_path)
    file = next(tmp_path.iterdir())
    with pytest.raises(InputError, match=message or "rows of 'n' differ in length") as error:
        list(open_input(file).chunks())
    assert file.name in str(error.value)


def test_a_file_that_was_cut_is_refused(acts, tmp_path):
    file = as_npy(acts, tmp_path)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"acts\.npy"):
        open_input(file)


@pytest.mark.parametrize("shape", [(), (64,)])
def test_numbers_that_are_no_rows_are_refused(shape, tmp_path):
    np.save(tmp_path / "acts.npy", np.zeros(shape, "float32"))
    for acts in (tmp_path / "acts.npy", torch.zeros(shape or (1,))):
        with pytest.raises(InputError, match="rows of activations are wanted"):
            crosscode.train(
                acts, {"type": "sae", "n_latents": 4, "activation": {"type": "topk", "k": 1}}, run_dir=tmp_path / "r"
            )


def test_activations_that_do_not_vary_have_no_fvu_and_are_no_traceback(tmp_path, capsys):
    import yaml

    np.save(tmp_path / "acts.npy", np.ones((200, 8), "float32"))
    values = {
        "run_dir": str(tmp_path / "run"), "device": "cpu", "backend": "torch", "evaluation": {"n_tokens": 16},
        "data": {"source": {"type": "arrays", "names": [["a"]], "files": [{"path": str(tmp_path / "acts.npy")}]}},
        "crosscoder": {
            "type": "sae", "n_latents": 8, "activation": {"type": "topk", "k": 2}, "init": {"type": "anthropic_transpose"},
        },
        "objective": {"recon": {}}, "train": {"n_tokens": 128, "batch_size": 64},
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    main(["train", str(tmp_path / "c.yaml")])
    assert "FVU         undefined, it does not vary  a" in capsys.readouterr().out
