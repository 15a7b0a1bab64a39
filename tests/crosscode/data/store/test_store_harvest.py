"""Harvest into a store: the same rows whatever interrupts it, and every row harvested once."""

import errno
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from crosscode.data import (
    ActivationCache,
    ActivationHarvester,
    ActivationsDataloader,
    HarvestThroughStore,
    StoredRows,
    StoreError,
    TokenSequenceLoader,
    harvest_to_store,
    make_manifest,
    wrap_documents,
)
from crosscode.data.rows import HarvestedRows
from crosscode.data.store import writer as store_writer
from crosscode.errors import InputError

NAMES = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


@pytest.fixture(scope="module")
def harvester(model_pair, remember_harvests):
    return remember_harvests(ActivationHarvester(model_pair, NAMES))


@pytest.fixture
def token_loader(tokenizer, documents):
    return TokenSequenceLoader(
        wrap_documents(documents), tokenizer, sequence_length=8, batch_size=4, epochs=1, shuffle=True, seed=1
    )


@pytest.fixture(scope="module")
def all_rows(harvester, tokenizer, documents):
    loader = TokenSequenceLoader(
        wrap_documents(documents), tokenizer, sequence_length=8, batch_size=4, epochs=1, seed=1
    )
    return torch.cat([rows.acts_RMPD for rows in HarvestedRows(loader, harvester).open()])


@pytest.fixture
def count_harvests(harvester, monkeypatch):
    calls = []
    harvest = harvester.harvest
    monkeypatch.setattr(harvester, "harvest", lambda *args: calls.append(1) or harvest(*args))
    return calls


def stored(cache):
    return cache.read_rows(torch.arange(cache.n_rows))


def test_the_store_holds_every_usable_row_in_order(tmp_path, token_loader, harvester, all_rows):
    seen = []
    cache = harvest_to_store(
        token_loader, harvester, tmp_path, shard_bytes=20_000, on_progress=lambda *counts: seen.append(counts)
    )
    assert torch.equal(stored(cache), all_rows)
    assert len(cache.shards) > 3
    assert seen[-1][0] == len(all_rows)
    ActivationCache(tmp_path, expected=make_manifest(token_loader, harvester, dtype="float32"))


def test_a_complete_store_is_left_alone(tmp_path, token_loader, harvester, count_harvests):
    harvest_to_store(token_loader, harvester, tmp_path)
    n = len(count_harvests)
    harvest_to_store(token_loader, harvester, tmp_path)
    assert len(count_harvests) == n


def test_max_rows_stops_and_a_larger_one_continues(tmp_path, token_loader, harvester, all_rows, count_harvests):
    first = harvest_to_store(token_loader, harvester, tmp_path, max_rows=100)
    assert 100 <= first.n_rows < 130
    n = len(count_harvests)
    second = harvest_to_store(token_loader, harvester, tmp_path)
    assert torch.equal(stored(second), all_rows)
    assert len(count_harvests) == n + -(-(len(all_rows) - first.n_rows) // 28)


def test_a_store_of_another_model_or_text_is_refused(tmp_path, token_loader, harvester, model_pair):
    harvest_to_store(token_loader, harvester, tmp_path)
    with pytest.raises(StoreError, match=r"models.0.weights .*'tiny-0' and 'tiny-1'"):
        harvest_to_store(token_loader, ActivationHarvester(model_pair[::-1], NAMES), tmp_path)
    with pytest.raises(StoreError, match=r"tokens.keep_first_position is False in the store and True in this run"):
        harvest_to_store(token_loader.fresh(keep_first_position=True), harvester, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "store dtype: 'float8' is not one of float32, bfloat16, int8"),
        ({"max_rows": 0}, "max_rows: 0 is below 1"),
        ({"max_bytes": 0}, "max_bytes: 0 is below 1"),
        ({"shard_bytes": 0}, "shard_bytes: 0 is below 1"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, token_loader, harvester, options, message):
    with pytest.raises(InputError, match=message):
        harvest_to_store(token_loader, harvester, tmp_path / "store", **options)
    assert not (tmp_path / "store").exists()


def test_batches_from_a_store_continue_exactly(tmp_path, token_loader, harvester):
    cache = harvest_to_store(token_loader, harvester, tmp_path)

    def make(**options):
        rows = StoredRows(cache, epochs=2, rows_per_read=50, **options)
        return ActivationsDataloader(rows, batch_size=20, prefetch=2)

    for options in ({}, {"read_block": 8}):
        expected = list(make(**options))
        interrupted = make(**options)
        iterator = iter(interrupted)
        for _ in range(7):
            next(iterator)
        resumed = make(**options)
        resumed.load_state_dict(interrupted.state_dict())
        got = list(resumed)
        interrupted.close()
        assert len(got) == len(expected) - 7
        assert all(torch.equal(a, b) for a, b in zip(got, expected[7:], strict=True))
        torch.testing.assert_close(resumed.scaling_MP, cache.scaling_MP())


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"dtype": "int8"}, {"max_bytes": 30_000}])
def test_harvest_through_a_store_harvests_once_and_repeats_the_values(
    tmp_path, token_loader, harvester, all_rows, count_harvests, options
):
    rows = HarvestThroughStore(token_loader.fresh(epochs=3), harvester, tmp_path, shard_bytes=10_000, **options)
    stream = rows.open()
    items = list(stream)
    stream.close()
    epochs = [torch.cat([item.acts_RMPD for item in items if item.epoch == epoch]).float() for epoch in range(3)]
    for epoch in epochs:
        assert torch.equal(epoch[:, 0, 0, 0].sort().values, epochs[0][:, 0, 0, 0].sort().values)
    if options.get("dtype") is None:
        assert torch.equal(epochs[0], all_rows)
    n_once = -(-len(all_rows) // 28)
    if "max_bytes" in options:
        assert n_once < len(count_harvests) < 3 * n_once
        assert sum(path.stat().st_size for path in tmp_path.glob("shard-*")) <= 30_000
    else:
        assert len(count_harvests) == n_once
        assert not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize("options", [{}, {"max_bytes": 30_000}])
@pytest.mark.parametrize("stop", [0, 3, 11, 20, 31])
def test_harvest_through_a_store_continues_exactly(tmp_path, token_loader, harvester, stop, options):
    """The run saved its position, went on, and was killed: the store is ahead of the position or behind it."""

    def make(path):
        rows = HarvestThroughStore(token_loader.fresh(epochs=3), harvester, path, shard_bytes=10_000, **options)
        return ActivationsDataloader(rows, batch_size=40, shuffle_buffer_size=80)

    expected = list(make(tmp_path / "a"))
    for n_more, lost in ((0, True), (3, False)):
        path = tmp_path / f"b{n_more}"
        interrupted = make(path)
        iterator = iter(interrupted)
        for _ in range(stop):
            next(iterator)
        state = interrupted.state_dict()
        for _ in range(n_more):
            next(iterator)
        if lost:
            interrupted._iterator._stream._writer._waiting = []
        interrupted.close()
        resumed = make(path)
        resumed.load_state_dict(state)
        got = list(resumed)
        resumed.close()
        assert len(got) == len(expected) - stop
        assert all(torch.equal(a, b) for a, b in zip(got, expected[stop:], strict=True))


KILLED_HARVEST = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import conftest
from crosscode.data import *
from crosscode.data.store import writer as store_writer
from crosscode.data.rows import HarvestedRows

tokenizer = conftest.make_tokenizer()
models = [wrap_language_model(conftest.make_model("llama", seed=seed), tokenizer, str(seed)) for seed in (0, 1)]
harvester = ActivationHarvester(models, ["blocks.1.hook_resid_post"])
loader = TokenSequenceLoader(wrap_documents(conftest.make_documents(60)), tokenizer, sequence_length=8, batch_size=2,
                             epochs=1, seed=1)
folder, dtype = sys.argv[2], "float32"


def harvest(path):
    return harvest_to_store(loader, harvester, path, dtype=dtype, shard_bytes=8_000)


started = time.perf_counter()
reference = harvest(f"{folder}/reference")
duration = time.perf_counter() - started
expected = reference.read_rows(torch.arange(reference.n_rows))
rng = random.Random(0)
kills = torn = stores = 0
n_rows = 0
while kills < 50:
    child = os.fork()
    if child == 0:
        harvest(f"{folder}/{stores}")
        os._exit(0)
    time.sleep(rng.uniform(0, duration / 3))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.path.exists(f"{folder}/{stores}/manifest.json"):
        cache = ActivationCache(f"{folder}/{stores}")
        assert cache.n_rows >= n_rows, "a whole shard was lost"
        n_rows = cache.n_rows
        assert torch.equal(cache.read_rows(torch.arange(n_rows)), expected[:n_rows]), "a wrong value"
        torn += any(name.startswith(".crosscode-tmp-") for name in os.listdir(f"{folder}/{stores}"))
    if os.WIFSIGNALED(status):
        kills += 1
    else:
        assert status == 0 and n_rows == len(expected)
        stores, n_rows = stores + 1, 0
assert torch.equal(harvest(f"{folder}/{stores}").read_rows(torch.arange(len(expected))), expected)
print(f"kills {kills}, of which {torn} left a torn file; stores completed {stores + 1}; {len(reference.shards)} shards")
"""


def run_script(code, *arguments):
    here = str(Path(__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), here, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )


def test_kill_9_at_fifty_random_points_loses_no_whole_shard_and_gives_no_wrong_value(tmp_path):
    result = run_script(KILLED_HARVEST, tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "kills 50" in result.stdout


TWO_PROCESSES = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import conftest
from crosscode.data import *

tokenizer = conftest.make_tokenizer()
model = wrap_language_model(conftest.make_model("llama"), tokenizer, "m")
harvester = ActivationHarvester([model], ["blocks.1.hook_resid_post"])
loader = TokenSequenceLoader(wrap_documents(conftest.make_documents(60)), tokenizer, sequence_length=8, epochs=1)
children = []
for _ in range(4):
    child = os.fork()
    if child == 0:
        try:
            harvest_to_store(loader, harvester, sys.argv[2], shard_bytes=4_000)
            os._exit(0)
        except StoreError as error:
            assert "is being written by another process" in str(error), error
            os._exit(7)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
assert 0 in codes and set(codes) <= {0, 7}, codes
cache = ActivationCache(sys.argv[2])
cache.verify()
print(cache.n_rows)
"""


def test_processes_that_write_at_the_same_time_cannot_corrupt_a_store(tmp_path, harvester, tokenizer, build_documents):
    result = run_script(TWO_PROCESSES, tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    loader = TokenSequenceLoader(wrap_documents(build_documents(60)), tokenizer, sequence_length=8, epochs=1)
    assert int(result.stdout) == sum(int(batch.mask_HS.sum()) for batch in loader)


@pytest.mark.parametrize("n_written", [0, 2])
def test_training_goes_on_without_a_store_that_the_disk_refuses(
    tmp_path, token_loader, harvester, all_rows, monkeypatch, caplog, n_written
):
    write_shard, shards = store_writer.write_shard, []

    def refuse(*args):
        if len(shards) == n_written:
            raise OSError(errno.ENOSPC, "No space left on device")
        shards.append(1)
        return write_shard(*args)

    monkeypatch.setattr(store_writer, "write_shard", refuse)
    rows = HarvestThroughStore(token_loader.fresh(epochs=2), harvester, tmp_path, shard_bytes=20_000)
    stream = rows.open()
    seen = torch.cat([item.acts_RMPD for item in stream])
    stream.close()
    assert torch.equal(seen, torch.cat([all_rows, all_rows]))
    assert "No space left on device" in caplog.text
    assert "training goes on" in caplog.text
    monkeypatch.undo()
    kept = ActivationCache(tmp_path)
    assert len(kept.shards) == n_written
    whole = harvest_to_store(token_loader, harvester, tmp_path, shard_bytes=20_000)
    assert torch.equal(stored(whole), all_rows)
