"""Weights in several files: whatever reads a model reads them, and says in one line what is wrong with them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import crosscode
from crosscode import checksums
from crosscode.checksums import write_checksums
from crosscode.commands.cli import main
from crosscode.config.experiment import TrainConfig
from crosscode.errors import InputError
from crosscode.interop.hub import contents
from crosscode.models import BaseCrosscoder
from crosscode.runs.checkpoints import find_step_damage
from crosscode.runs.directory import RunDirectory
from crosscode.trainers.warm_start import find_model
from crosscode.weight_files import (
    INDEX_FILE,
    WEIGHTS_FILE,
    SpreadTensor,
    n_bytes_of,
    read_tensor_,
    row_pieces,
    weight_files,
    write_weights,
)


def without_checksums(path):
    (path / "checksums.json").unlink()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "has_checksums": False}))


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture
def model(make_case):
    return make_case("acausal_2x1", dtype=torch.float32).model


@pytest.fixture
def split(model, tmp_path):
    model.save(tmp_path / "model", max_shard_size=1)
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("size", "n_bytes"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 << 19), (700, 700), ("700", 700), ("2kb", 2000)]
)
def test_a_size(size, n_bytes):
    assert n_bytes_of(size) == n_bytes
    assert TrainConfig.model_validate({"n_tokens": 10_000, "max_shard_size": size}).max_shard_size == str(size)


@pytest.mark.parametrize("size", ["", "five", "-5GB", 0, "0GB", None, "nan"])
def test_what_is_no_size(size, model, tmp_path):
    with pytest.raises(InputError, match=r"max_shard_size = .* is no size of a file; write '5GB'"):
        model.save(tmp_path / "new", max_shard_size=size)
    assert names(tmp_path) == [], "nothing is left"
    with pytest.raises(ValueError, match="is no size of a file"):
        TrainConfig.model_validate({"n_tokens": 10_000, "max_shard_size": size})


@pytest.mark.parametrize("kind", ["sae", "acausal_2x1", "cross_layer_skip", "compound"])
@pytest.mark.parametrize("activation", ["relu", "batch_topk"])
def test_every_limit_gives_back_every_bit(make_case, kind, activation, tmp_path):
    model = make_case(kind, activation, dtype=torch.float32).model
    state = model.state_dict()
    sizes = sorted(tensor.nbytes for tensor in state.values())
    for limit in (1, sizes[-1], sizes[-1] + sizes[0], sum(sizes) - 1, sum(sizes)):
        model.save(tmp_path / "model", max_shard_size=limit)
        loaded = BaseCrosscoder.load(tmp_path / "model", backend="reference").state_dict()
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], state[name]) for name in state)
        files = [tmp_path / "model" / name for name in weight_files(tmp_path / "model") if name != INDEX_FILE]
        assert (len(files) == 1) == (limit == sum(sizes))
        for file in files:
            held = load_file(file)
            assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= limit
        listed = {*weight_files(tmp_path / "model"), "checksums.json", "config.json"}
        assert set(names(tmp_path / "model")) == listed, "files of the model before are gone"


def test_others_find_their_layout(split, model):
    index = json.loads((split / INDEX_FILE).read_text())
    state = model.state_dict()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    assert sorted(set(index["weight_map"].values())) == [
        f"model-{i + 1:05}-of-{len(state):05}.safetensors" for i in range(len(state))
    ]
    from huggingface_hub import load_torch_model

    other = torch.nn.Module()
    for name, tensor in state.items():
        other.register_buffer(name.replace(".", "_"), torch.zeros_like(tensor)) if "." not in name else None
    load_torch_model(other, split, strict=False)
    assert torch.equal(other.W_enc_LXiDi, model.W_enc_LXiDi)


def damage_shard(folder):
    file = next(folder.glob("model-00001-*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def rewrite_index(change):
    def rewritten(folder):
        index = json.loads((folder / INDEX_FILE).read_text())
        change(index["weight_map"])
        (folder / INDEX_FILE).write_text(json.dumps(index))

    return rewritten


DAMAGES = {
    "a shard is gone": (lambda folder: next(folder.glob("model-00002-*")).unlink(), "is missing", "missing; a saved"),
    "a bit is another": (damage_shard, "has another checksum", None),
    "a shard is cut": (lambda folder: next(folder.glob("model-00001-*")).write_bytes(b"12"), "2 bytes", "damaged"),
    "the index is gone": (
        lambda folder: (folder / INDEX_FILE).unlink(),
        r"lacks model.safetensors",
        r"model.safetensors: missing",
    ),
    "the index is cut": (lambda folder: (folder / INDEX_FILE).write_text("{"), "as JSON", "as JSON"),
    "the index names another file": (
        rewrite_index(lambda where: where.update(W_enc_LXiDi="../../secret.safetensors")),
        "no name of a file with weights",
        "no name of a file with weights",
    ),
    "the index lacks a tensor": (
        rewrite_index(lambda where: where.pop("W_enc_LXiDi")),
        "lacks|has .* bytes|checksum",
        "not part|is not where|is missing",
    ),
    "the index swaps two": (
        rewrite_index(lambda where: where.update(W_enc_LXiDi=where["b_enc_L"], b_enc_L=where["W_enc_LXiDi"])),
        "bytes instead|another checksum",
        "is not where it says",
    ),
    "one file lies beside": (
        lambda folder: save_file({"a": torch.zeros(1)}, folder / WEIGHTS_FILE),
        "lacks model.safetensors",
        "is missing",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_wrong_is_one_line(split, name):
    damage, said, said_without_checksums = DAMAGES[name]
    damage(split)
    with pytest.raises(InputError, match=said) as raised:
        BaseCrosscoder.load(split)
    assert "\n" not in str(raised.value)
    if said_without_checksums is not None:
        without_checksums(split)
        with pytest.raises(InputError, match=said_without_checksums) as raised:
            BaseCrosscoder.load(split)
        assert "\n" not in str(raised.value)


def test_a_save_that_fails_midway_leaves_what_was(split, model, monkeypatch):
    before, files = {file.name: file.read_bytes() for file in split.iterdir()}, []

    def full(tensors, file):
        files.append(file)
        if len(files) == 3:
            raise OSError(28, "No space left on device")
        save_file(tensors, file)

    monkeypatch.setattr("crosscode.weight_files.save_tensors", full)
    with pytest.raises(OSError, match="No space"):
        model.save(split, max_shard_size=1)
    assert {file.name: file.read_bytes() for file in split.iterdir()} == before
    assert names(split.parent) == [split.name]


def test_loading_holds_no_second_copy(tmp_path):
    """Measured in a process of its own: the weights once, and a piece of a file."""
    tensors = {name: torch.ones(600_000, 64) for name in ("a", "b")}  # 154 MB each
    write_weights(tensors, tmp_path, "200MB")
    code = f"""
import torch, resource
from pathlib import Path
from crosscode.weight_files import read_tensor_, row_pieces, tensor_files
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) << 10
own = {{name: torch.empty(600_000, 64) for name in "ab"}}
with torch.no_grad():
    next(iter(row_pieces(*reversed([*tensor_files(Path({str(tmp_path)!r})).items()][0]))))
before = peak()
for name, file in tensor_files(Path({str(tmp_path)!r})).items():
    read_tensor_(own[name], file, name)
assert all(bool((own[name] == 1).all()) for name in "ab")
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    weights = sum(tensor.nbytes for tensor in tensors.values())
    assert int(done.stdout) < 1.4 * weights


class Rows(SpreadTensor):
    def __init__(self, start, rows_R):
        self.start, self.rows_R = start, rows_R

    @property
    def own_rows(self):
        return self.start, self.rows_R

    def save(self, tensors, file):
        raise NotImplementedError


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (2, 5), (6, 7), (3, 3)])
def test_of_a_spread_tensor_only_what_is_here_is_read(start, stop, tmp_path, monkeypatch):
    whole, read = torch.arange(21.0).reshape(7, 3), []
    save_file({"a": whole, "b": torch.tensor(2.0)}, tmp_path / "x.safetensors")
    monkeypatch.setattr("crosscode.weight_files._BYTES_AT_ONCE", 24)  # two rows

    def pieces(*arguments):
        for first, rows in row_pieces(*arguments):
            read.extend(range(first, first + rows.shape[0]) if rows.dim() else [])
            yield first, rows

    monkeypatch.setattr("crosscode.weight_files.row_pieces", pieces)
    rows_R = torch.full((stop - start, 3), -1.0)
    read_tensor_(Rows(start, rows_R), tmp_path / "x.safetensors", "a")
    assert torch.equal(rows_R, whole[start:stop])
    assert read == [*range(start, stop)]
    number = torch.tensor(0.0)
    read_tensor_(number, tmp_path / "x.safetensors", "b")
    assert number == 2


@pytest.fixture
def run(tiny_config, tmp_path):
    """A run whose every tensor has a file of its own; its last checkpoint is that before the end."""
    tiny_config["train"] |= {"max_shard_size": "1", "checkpoint_every": 2}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tiny_config))
    assert main(["train", str(file)]) == 0
    return RunDirectory(tiny_config["run_dir"])


def test_every_command_reads_them(run, tmp_path, capsys, monkeypatch):
    final, folder = {file.name: file.read_bytes() for file in run.final.iterdir()}, str(run.path)
    assert INDEX_FILE in final and WEIGHTS_FILE not in final and run.is_finished()
    run.drop_figures()
    shutil.rmtree(run.final)
    shutil.rmtree(run.checkpoint(run.steps()[-1]))
    assert main(["train", "--resume", folder]) == 0
    assert {file.name: file.read_bytes() for file in run.final.iterdir()} == final, "resumed to the bit"
    assert main(["verify", folder]) == 0
    assert main(["verify", str(run.final)]) == 0
    assert main(["evaluate", folder]) == 0
    hashed: list[str] = []
    monkeypatch.setattr(checksums, "_sha256", lambda file, of=checksums._sha256: hashed.append(file.name) or of(file))
    assert main(["report", folder]) == 0
    shards = [name for name in hashed if name.startswith("model-")]
    assert sorted(shards) == sorted(name for name in final if name.startswith("model-0")), "each is hashed once"
    out = tmp_path / "jumprelu"
    assert main(["convert", folder, "--out", str(out)]) == 0
    assert INDEX_FILE in names(out / "final"), "as large as the run's own"
    assert main(["export", folder, "--to", "dictionary-learning", "--out", str(tmp_path / "dl")]) in (0, 2)
    capsys.readouterr()
    assert main(["push", folder, "user/name", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in final)
    loaded = crosscode.open(folder).model
    assert torch.equal(loaded.W_dec_LXoDo, BaseCrosscoder.load(run.final, backend="torch").W_dec_LXoDo)
    next(run.final.glob("model-00001-*")).unlink()
    for command in (["evaluate", folder], ["report", folder], ["convert", folder, "--out", str(tmp_path / "new")]):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert "model-00001-of-" in line and "is missing" in line
    assert main(["verify", folder]) == 1
    assert not (tmp_path / "new").exists()


def test_weights_with_a_shard_of_another_run_are_refused(split, model, make_case, tmp_path):
    make_case("acausal_2x1", dtype=torch.float32, seed=3).model.save(tmp_path / "other", max_shard_size=1)
    file = next((tmp_path / "other").glob("model-00001-*")).name
    shutil.copyfile(tmp_path / "other" / file, split / file)
    with pytest.raises(InputError, match="has another checksum"):
        BaseCrosscoder.load(split)
    write_checksums(split)
    assert find_model(str(split)) == split
    with safe_open(split / file, "pt") as shard:
        assert len(list(shard.keys())) == 1


def test_the_digest_is_of_all_files(split, model, tmp_path):
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(split, run.final)
    digest = run.model_digest()
    assert digest is not None and digest == run.model_digest()
    with torch.no_grad():
        model.b_enc_L[0] += 1
    model.save(run.final, max_shard_size=1)
    assert run.model_digest() not in (None, digest)
    assert not run.is_finished() and run.has_final()
    run.check_final()


def test_all_of_it_goes_to_the_hub(split):
    gone = contents(split, None, "user/name")
    assert set(gone) == {*names(split), "README.md"}


def test_a_checkpoint_lacks_a_shard(split):
    next(split.glob("model-00002-*")).unlink()
    assert find_step_damage(split) is not None
