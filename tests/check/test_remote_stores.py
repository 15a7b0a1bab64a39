"""Commands on stores in a double of S3: as on folders, with writers that are killed, with ranks, and runs that read them."""

import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from object_stores import s3_server
from ranks import finish, spawn

pytestmark = pytest.mark.soak  # minutes of commands one behind the other

CROSSCODE = str(Path(sys.executable).with_name("crosscode"))
SMALL = ["--data.harvest_batch_size", "4", "--data.sequence_length", "128"]
HARVEST = ["harvest", "demo_tuned", "--n-tokens", "4k", "--data.cache.shard_mb", "1", *SMALL]
TRAIN = [
    "train", "demo_tuned", "--train.n_tokens", "10k", "--train.batch_size", "256", "--crosscoder.n_latents", "64",
    "--crosscoder.activation.k", "4", "--evaluation.n_tokens", "512", "--evaluation.every", "null",
    "--train.checkpoint_every", "20", "--data.shuffle_buffer_size", "1024", *SMALL,
]  # fmt: skip


@pytest.fixture(scope="module")
def s3():
    with s3_server() as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in {**variables, "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"


def crosscode(*words):
    ended = subprocess.run([CROSSCODE, *words], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def names(place):
    """Of its files, and where each is."""
    files = fsspec.filesystem("s3" if place.startswith("s3") else "file")
    files.invalidate_cache()
    return {each.rpartition("/")[2]: (files, each) for each in files.find(place)}


def contents(place):
    """But positions, whose two entries safetensors writes in any order."""
    found = names(place).items()
    return {name: files.cat_file(file) for name, (files, file) in found if "resume" not in name and name != "lock"}


@pytest.fixture(scope="module")
def near(tmp_path_factory, s3):
    folder = str(tmp_path_factory.mktemp("near") / "store")
    crosscode(*HARVEST, "--store", folder)
    return folder


def killed(words, url, moment):
    """Behind the first shard; the writer's marker stays."""
    process = subprocess.Popen([CROSSCODE, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any(name.startswith("shard") for name in names(url)):
        assert process.poll() is None
    time.sleep(moment)
    process.kill()
    process.wait()


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_harvest_goes_on_and_is_whole(s3, near, seed):
    url = f"{s3}/killed {seed}"
    killed([*HARVEST, "--store", url], url, random.Random(seed).random())
    crosscode(*HARVEST, "--store", url)
    assert contents(url) == contents(near)
    said = crosscode("verify", url)
    assert re.fullmatch(r"whole   rows\n(whole   resume-\d+-\w+\.safetensors\n)+", said), said


def test_damage_is_found(s3, near):
    files = fsspec.filesystem("s3")
    for name, content in contents(near).items():
        files.pipe_file(f"bucket/damaged/{name}", content)
    shard = contents(near)["shard-000001.safetensors"]
    files.pipe_file("bucket/damaged/shard-000001.safetensors", shard[:-999] + bytes([shard[-999] ^ 1]) + shard[-998:])
    ended = subprocess.run([CROSSCODE, "verify", f"{s3}/damaged"], capture_output=True, text=True)
    assert ended.returncode == 1 and re.search("shard-000001.*checksum", ended.stdout), ended.stdout


def test_ranks_write_and_read_it(s3, near, tmp_path):
    url = f"{s3}/ranks"
    finish(spawn(2, words=[CROSSCODE, *HARVEST, "--store", url]))
    assert contents(url) == contents(near)
    finals = []
    for name, store in (("far", url), ("near", near)):
        words = [
            *TRAIN,
            "--data.stores",
            json.dumps([store]),
            "--data.store_read_block",
            "8",
            "--run_dir",
            str(tmp_path / name),
        ]
        finish(spawn(2, words=[CROSSCODE, *words]))
        finals.append(load_file(tmp_path / name / "final" / "model.safetensors"))
    assert all(torch.equal(weight, finals[1][name]) for name, weight in finals[0].items())


def test_ranks_that_are_killed_there_go_on(s3, near):
    url = f"{s3}/killed ranks"
    ranks = spawn(2, words=[CROSSCODE, *HARVEST, "--store", url])
    while not any(name.startswith("shard") for name in names(url)):
        assert all(each.poll() is None for each in ranks), [each.communicate()[0] for each in ranks]
    ranks[0].kill()
    assert ranks[1].wait(timeout=120) in (74, 0)
    finish(spawn(2, words=[CROSSCODE, *HARVEST, "--store", url]))
    assert contents(url) == contents(near)


def test_a_run_fills_a_store_and_goes_on_from_it(s3, tmp_path):
    finals = []
    for name, store in (("far", f"{s3}/cache"), ("near", str(tmp_path / "cache"))):
        words = [
            "--data.cache.path",
            store,
            "--data.cache.shard_mb",
            "1",
            "--data.epochs",
            "null",
            "--data.cache.max_gb",
            "0.004",
        ]
        run = tmp_path / name
        process = subprocess.Popen(
            [CROSSCODE, *TRAIN, *words, "--run_dir", str(run)], stderr=subprocess.PIPE, text=True
        )
        while not (run / "checkpoints" / "step_20").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        process.kill()
        process.communicate()
        crosscode("train", "--resume", str(run))
        finals.append(load_file(run / "final" / "model.safetensors"))
        assert crosscode("verify", store).startswith("whole   rows")
    assert all(torch.equal(weight, finals[1][name]) for name, weight in finals[0].items())
    assert contents(f"{s3}/cache") == contents(str(tmp_path / "cache"))


def test_joined_stores_train_and_the_run_is_looked_at(s3, tmp_path):
    parts = [f"{s3}/part{m}" for m in (0, 1)]
    for m, url in enumerate(parts):
        crosscode(*HARVEST, "--models", str(m), "--store", url)
    run = str(tmp_path / "run")
    crosscode(*TRAIN, "--data.join", ",".join(parts), "--run_dir", run)
    assert all(part in (tmp_path / "run" / "config.yaml").read_text() for part in parts)
    assert json.loads(crosscode("evaluate", run, "--n-tokens", "512"))["fvu"] < 1
    crosscode("report", run, "--n-tokens", "512")
    assert (tmp_path / "run" / "report.html").exists()
    assert crosscode("verify", run).count("damaged") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.cache.path", "s3://nowhere/a"], r"data.cache: store 's3://nowhere/a' cannot be written: .*bucket"),
        (["--data.stores", '["s3://nowhere/a"]'], r"data.stores.0: store 's3://nowhere/a': no such store"),
        (["--data.stores", '["nosuch://a/b"]'], r"data.stores.0: store 'nosuch://a/b': .*nosuch"),
        (["--data.join", "s3://bucket/none,s3://bucket/neither"], r"data.join: store 's3://bucket/none': no such store"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_said_before_a_model_is_loaded(s3, tmp_path, words, said):
    command = [CROSSCODE, *TRAIN, *words, "--run_dir", str(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and "loading" not in ended.stderr
    assert re.search(said, ended.stderr), ended.stderr
    assert not (tmp_path / "run").exists()
