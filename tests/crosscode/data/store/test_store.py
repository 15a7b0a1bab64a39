"""The store gives back what was put in, says so when it cannot, and never overwrites."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosscode.data import ActivationCache, ActivationCacheWriter
from crosscode.data.permutation import permuted
from crosscode.data.store.beginning import check_can_write
from crosscode.data.store.format import Layout, StoreError, pack, row_sums, unpack
from crosscode.data.store.rows import StoredRows
from crosscode.data.store.window import WindowedOrder
from crosscode.errors import InputError

DIMS = (2, 1, 12)
MODELS = [{"name": n, "revision": None, "weights": w, "dtype": "float32"} for n, w in (("a", "11"), ("b", "22"))]


def manifest_of(dtype="float32", **changes):
    manifest = {
        "format": "crosscode-activations",
        "version": 1,
        "models": MODELS,
        "tokenizer": "t",
        "hookpoints": ["blocks.0.hook_resid_post"],
        "dims": list(DIMS),
        "dtype": dtype,
        "tokens": {"sequence_length": 8, "seed": 0, "dataset": "d"},
    }
    return {**manifest, **changes}


def rows_of(n, seed=0):
    return torch.randn(n, *DIMS, generator=torch.Generator().manual_seed(seed)) * 3


def write(path, rows, *, dtype="float32", shard_rows=30, chunk=10, finish=True, **changes):
    bytes_per_row = Layout(DIMS, dtype).row_bytes
    with ActivationCacheWriter(path, manifest_of(dtype, **changes), shard_bytes=shard_rows * bytes_per_row) as writer:
        for first in range(0, len(rows), chunk):
            writer.append(rows[first : first + chunk], {"next": first + chunk, "pending": torch.arange(3)})
        if finish:
            writer.finish()
    return ActivationCache(path)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("bfloat16", 0.004), ("int8", 0.02)])
def test_rows_come_back(tmp_path, dtype, tolerance):
    rows = rows_of(95)
    cache = write(tmp_path, rows, dtype=dtype)
    assert (cache.n_rows, len(cache.shards), cache.dims) == (95, 4, DIMS)
    index = torch.randperm(95)
    got = cache.read_rows(index).float()
    largest = rows[index].abs().amax(dim=-1, keepdim=True)
    assert ((got - rows[index]).abs() <= tolerance * largest).all()
    torch.testing.assert_close(cache.scaling_MP(), 12**0.5 / rows.norm(dim=-1).mean(dim=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_any_order_of_rows_gives_the_same_rows(tmp_path, dtype, monkeypatch):
    """Runs that end with a part, runs that end with a shard, repeated rows, more shards than stay open."""
    monkeypatch.setattr("crosscode.data.store.reader._BYTES_AT_ONCE", 1)
    monkeypatch.setattr("crosscode.data.store.reader._MAX_OPEN_SHARDS", 2)
    cache = write(tmp_path, rows_of(195), dtype=dtype)
    whole = torch.cat([cache.read_rows(torch.tensor([i])) for i in range(195)])
    assert torch.equal(cache.read_rows(torch.arange(195)), whole)
    index = torch.randint(195, (500,))
    assert torch.equal(cache.read_rows(index), whole[index])
    assert cache.read_rows(index[:0]).shape == (0, *DIMS)
    for wrong in (-1, 195):
        with pytest.raises(StoreError, match=f"row {wrong} asked for, but it has 195"):
            cache.read_rows(torch.tensor([3, wrong]))


def test_threads_that_read_from_one_object_do_not_disturb_each_other(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    rows = rows_of(95)
    write(tmp_path, rows, dtype="float32")
    cache = ActivationCache(tmp_path)
    indices = [torch.randint(95, (60,)) for _ in range(200)]
    with ThreadPoolExecutor(4) as pool:
        for index, got in zip(indices, pool.map(cache.read_rows, indices), strict=True):
            assert torch.equal(got, rows[index])


def test_memory_does_not_grow_with_the_store(tmp_path):
    """Every row is read; what the process maps or holds is the window and little else."""

    def grown(times):
        def mapped_and_held():
            lines = Path("/proc/self/status").read_text().splitlines()
            return sum(int(line.split()[1]) for line in lines if line.startswith(("RssFile", "RssAnon"))) << 10

        dims = (1, 1, 1024)
        rows = torch.randn(512, *dims)
        path = tmp_path / str(times)
        with ActivationCacheWriter(path, manifest_of(dims=list(dims)), shard_bytes=8 << 20) as writer:
            for i in range(times):
                writer.append(rows, {"next": i})
        cache = ActivationCache(path)
        cache.read_rows(torch.arange(256))
        before = mapped_and_held()
        for item in StoredRows(cache, epochs=1, rows_per_read=256, window=512).open():
            del item
        return mapped_and_held() - before, cache.n_bytes

    for growth, n_bytes in (grown(16), grown(48)):
        assert n_bytes > 30 << 20
        assert growth < 8 << 20


def test_any_safetensors_reader_can_read_a_shard(tmp_path):
    from safetensors.torch import load_file

    rows = rows_of(25)
    shard = load_file(write(tmp_path, rows).shards[0].path)
    assert torch.equal(shard["acts"], rows)


@given(st.integers(1, 30), st.integers(1, 9), st.sampled_from(["float32", "bfloat16", "int8"]), st.data())
@settings(max_examples=60, deadline=None)
def test_every_flipped_bit_changes_the_row_sum(n, d, dtype, data):
    rows = pack(torch.randn(n, 1, 1, d), dtype)
    before = row_sums(rows).copy()
    flat = rows.acts_RE.view(-1)
    place = data.draw(st.integers(0, flat.numel() - 1))
    flat[place] ^= 1 << data.draw(st.integers(0, 7))
    assert (row_sums(rows) != before).sum() == 1


@given(st.integers(1, 20), st.floats(1e-6, 1e6))
@settings(max_examples=50, deadline=None)
def test_int8_error_is_at_most_half_a_step(n, size):
    acts = torch.randn(n, *DIMS) * size
    back = unpack(pack(acts, "int8"), Layout(DIMS, "int8"))
    step = acts.abs().amax(dim=-1, keepdim=True) / 127
    assert ((back - acts).abs() <= step * 0.501).all()
    assert torch.equal(unpack(pack(torch.zeros(2, *DIMS), "int8"), Layout(DIMS, "int8")), torch.zeros(2, *DIMS))


def test_size_on_disk_is_the_raw_tensors_and_a_little(tmp_path):
    dims = (1, 1, 768)
    acts = torch.randn(3000, *dims)
    for dtype, raw in {"float32": 4 * 768, "bfloat16": 2 * 768, "int8": 768 + 4}.items():
        with ActivationCacheWriter(tmp_path / dtype, manifest_of(dtype, dims=list(dims))) as writer:
            writer.append(acts, {"next": 0})
        size = sum(file.stat().st_size for file in (tmp_path / dtype).iterdir())
        assert size <= 1.01 * 3000 * raw, dtype


def test_writing_continues_after_the_last_whole_shard(tmp_path):
    rows = rows_of(95)
    with ActivationCacheWriter(tmp_path, manifest_of(), shard_bytes=3000) as writer:
        writer.append(rows[:40], {"next": 40})
        writer._waiting, writer._waiting_bytes = [], 0
    with ActivationCacheWriter(tmp_path, manifest_of(), shard_bytes=3000) as writer:
        assert (writer.n_rows, writer.resume_state, writer.finished) == (40, {"next": 40}, False)
        writer.append(rows[40:], {"next": 95})
        writer.finish()
    with ActivationCacheWriter(tmp_path, manifest_of()) as writer:
        assert (writer.n_rows, writer.finished) == (95, True)
    assert torch.equal(ActivationCache(tmp_path).read_rows(torch.arange(95)), rows)


def test_finish_without_waiting_rows_is_remembered(tmp_path):
    with ActivationCacheWriter(tmp_path, manifest_of()) as writer:
        writer.append(rows_of(5), {"next": 5})
        writer.flush()
        writer.finish()
    with ActivationCacheWriter(tmp_path, manifest_of()) as writer:
        assert writer.finished


def test_max_bytes_is_kept(tmp_path):
    with ActivationCacheWriter(tmp_path, manifest_of(), shard_bytes=2000, max_bytes=6000) as writer:
        for i in range(20):
            writer.append(rows_of(10, i), {"next": i})
        assert writer.full
    assert 4000 < sum(path.stat().st_size for path in tmp_path.glob("shard-*")) <= 6000


def test_only_one_process_writes(tmp_path):
    with ActivationCacheWriter(tmp_path, manifest_of()) as writer:
        with pytest.raises(StoreError, match=r"is being written by another process \(process \d+\)"):
            ActivationCacheWriter(tmp_path, manifest_of())
        writer.append(rows_of(3), {"next": 3})
    assert ActivationCache(tmp_path).n_rows == 3


def snapshot(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != "lock"}


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        (r"models.1.weights is '22' in the store and '33' in this run \(models 'b' and 'c'\)",
         {"models": [MODELS[0], {**MODELS[1], "weights": "33", "name": "c"}]}),
        ("hookpoints", {"hookpoints": ["blocks.1.hook_resid_post"]}),
        ("tokens.sequence_length is 8 in the store and 9 in this run",
         {"tokens": {"sequence_length": 9, "seed": 0, "dataset": "d"}}),
        ("tokenizer", {"tokenizer": "u"}),
        (r"models is \['a', 'b'\] in the store and \['a'\] in this run", {"models": MODELS[:1]}),
    ],
)  # fmt: skip
def test_a_store_of_something_else_is_refused_by_its_field(tmp_path, field, changes):
    write(tmp_path, rows_of(40))
    before = snapshot(tmp_path)
    with pytest.raises(StoreError, match=field):
        ActivationCache(tmp_path, expected=manifest_of(**changes))
    with pytest.raises(StoreError, match=field):
        ActivationCacheWriter(tmp_path, manifest_of(**changes))
    assert snapshot(tmp_path) == before


def test_order_and_dtype_matter_to_append_not_to_read(tmp_path):
    write(tmp_path, rows_of(40))
    other = manifest_of("int8", tokens={"sequence_length": 8, "seed": 1, "dataset": "d"})
    assert ActivationCache(tmp_path, expected=other).n_rows == 40
    with pytest.raises(StoreError, match="dtype is 'float32' in the store and 'int8'"):
        ActivationCacheWriter(tmp_path, other)


def test_a_moved_model_is_the_same_model(tmp_path):
    write(tmp_path, rows_of(40))
    moved = [{**model, "name": f"/elsewhere/{model['name']}", "revision": "main"} for model in MODELS]
    assert ActivationCache(tmp_path, expected=manifest_of(models=moved)).n_rows == 40


@pytest.mark.parametrize("part", ["header", "sums", "acts", "scales"])
def test_every_flipped_byte_is_noticed(tmp_path, part):
    cache = write(tmp_path, rows_of(40), dtype="int8")
    shard = cache.shards[0]
    first, last = {
        "header": (0, shard.offset),
        "sums": (shard.offset, shard.offset + 4 * shard.n_rows),
        "scales": (shard.offset + 4 * shard.n_rows, shard.offset + 12 * shard.n_rows),
        "acts": (shard.offset + 12 * shard.n_rows, shard.path.stat().st_size),
    }[part]
    whole = shard.path.read_bytes()
    for place in np.linspace(first, last - 1, 40).astype(int):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        shard.path.write_bytes(damaged)
        with pytest.raises(StoreError, match=r"shard-000000.*(does not match its checksum|damaged)"):
            ActivationCache(tmp_path).verify()


def test_a_damaged_manifest_or_position_is_noticed(tmp_path):
    write(tmp_path, rows_of(40))
    resume = next(tmp_path.glob("resume-*"))
    resume.write_bytes(resume.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match="does not match the checksum in its name"):
        ActivationCacheWriter(tmp_path, manifest_of())
    assert ActivationCache(tmp_path).n_rows == 40
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace("blocks.0", "blocks.1"))
    with pytest.raises(StoreError, match="does not match its checksum; it was damaged or edited"):
        ActivationCache(tmp_path)
    manifest.write_text(json.dumps({"format": "something"}))
    with pytest.raises(StoreError, match="is not the manifest of an activation store"):
        ActivationCache(tmp_path)
    manifest.write_text("[]")
    with pytest.raises(StoreError, match=r"valid dictionary|cannot be read as JSON"):
        ActivationCache(tmp_path)
    manifest.unlink()
    with pytest.raises(StoreError, match="no such store"):
        ActivationCache(tmp_path)
    with pytest.raises(StoreError, match="holds shards but no manifest"):
        ActivationCacheWriter(tmp_path, manifest_of())


@pytest.mark.parametrize("finished", [False, True])
def test_the_position_of_a_shard_that_was_never_finished_is_forgotten(tmp_path, finished, monkeypatch):
    """A process dies between the position and its shard; the next one closes that shard elsewhere."""

    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("crosscode.data.store.writer.write_shard", die)
        writer = ActivationCacheWriter(tmp_path, manifest_of(), shard_bytes=1 << 20)
        writer.append(rows_of(60), {"next": 60})
        with pytest.raises(KeyboardInterrupt):
            writer.finish() if finished else writer.flush()
        writer._release()
    with ActivationCacheWriter(tmp_path, manifest_of()) as writer:
        assert (writer.n_rows, writer.resume_state) == (0, None)
        writer.append(rows_of(20), {"next": 20})
    writer = ActivationCacheWriter(tmp_path, manifest_of())
    assert (writer.n_rows, writer.resume_state, writer.finished) == (20, {"next": 20}, False)
    writer.close()


@pytest.mark.parametrize("copied", ["manifest.json", "shard-000001.safetensors"])
def test_files_of_another_store_are_noticed(tmp_path, copied):
    other = manifest_of(models=[{**MODELS[0], "weights": "33"}, MODELS[1]])
    write(tmp_path / "one", rows_of(95))
    write(tmp_path / "two", rows_of(95, seed=1), models=other["models"])
    (tmp_path / "one" / copied).write_bytes((tmp_path / "two" / copied).read_bytes())
    before = snapshot(tmp_path / "one")
    with pytest.raises(StoreError, match=r"shard-00000\d.safetensors was written for another manifest"):
        ActivationCacheWriter(tmp_path / "one", other if copied == "manifest.json" else manifest_of())
    with pytest.raises(StoreError, match=r"shard-00000\d.safetensors was written for another manifest"):
        ActivationCache(tmp_path / "one")
    assert snapshot(tmp_path / "one") == before


def test_rounding_before_the_store_matters_to_append(tmp_path):
    write(tmp_path, rows_of(40))  # a manifest of before this was written down: float32
    ActivationCacheWriter(tmp_path, manifest_of(activation_dtype="float32")).close()
    with pytest.raises(StoreError, match="activation_dtype is 'float32' in the store and 'bfloat16' in this run"):
        ActivationCacheWriter(tmp_path, manifest_of(activation_dtype="bfloat16"))
    ActivationCache(tmp_path, expected=manifest_of(activation_dtype="bfloat16"))


@pytest.mark.parametrize("n_lost", [1, 100, 10_000])
def test_a_truncated_or_missing_shard_is_noticed(tmp_path, n_lost):
    cache = write(tmp_path, rows_of(95))
    path = cache.shards[1].path
    content = path.read_bytes()
    path.write_bytes(content[:-n_lost] if n_lost < len(content) else b"")
    before = snapshot(tmp_path)
    for attempt in (lambda: ActivationCache(tmp_path), lambda: ActivationCacheWriter(tmp_path, manifest_of())):
        with pytest.raises(StoreError, match=r"shard-000001.*(bytes long and should be|is damaged)"):
            attempt()
    assert snapshot(tmp_path) == before
    path.unlink()
    with pytest.raises(StoreError, match=r"shard-000001.* is missing, though shard-000002.safetensors is there"):
        ActivationCache(tmp_path)


@pytest.mark.parametrize("n_left", [0, 2, -1])
def test_shards_that_were_taken_from_the_end_are_noticed(n_left, tmp_path):
    cache = write(tmp_path, rows_of(95))
    for shard in cache.shards[n_left:]:
        shard.path.unlink()
    before = snapshot(tmp_path)
    for attempt in (lambda: ActivationCache(tmp_path), lambda: ActivationCacheWriter(tmp_path, manifest_of())):
        with pytest.raises(
            StoreError, match=rf"{n_left % len(cache.shards)} shards are there, but {len(cache.shards)} were written"
        ):
            attempt()
    assert snapshot(tmp_path) == before


def test_a_shard_that_is_cut_while_it_is_read_is_noticed(tmp_path):
    cache = write(tmp_path, rows_of(40), shard_rows=100)
    cache.read_rows(torch.arange(5))
    with open(cache.shards[0].path, "r+b") as file:
        file.truncate(cache.shards[0].path.stat().st_size - 500)
    with pytest.raises(StoreError, match="became shorter while it was read"):
        cache.read_rows(torch.arange(30, 40))


def test_a_full_disk_keeps_whole_shards(tmp_path):
    import resource
    import signal

    rows = rows_of(60)
    with ActivationCacheWriter(tmp_path, manifest_of(), shard_bytes=2000) as writer:
        writer.append(rows[:30], {"next": 30})
    before = snapshot(tmp_path)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, old[1]))
    try:
        with (
            pytest.raises(StoreError, match=r"cannot be written: File too large; 1 whole shards \(30 rows\) are kept"),
            ActivationCacheWriter(tmp_path, manifest_of(), shard_bytes=2000) as writer,
        ):
            writer.append(rows[30:], {"next": 60})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    after = snapshot(tmp_path)
    assert {name: after[name] for name in before} == before
    assert torch.equal(ActivationCache(tmp_path).read_rows(torch.arange(30)), rows[:30])
    with ActivationCacheWriter(tmp_path, manifest_of(), shard_bytes=2000) as writer:
        assert writer.n_rows == 30
        writer.append(rows[30:], {"next": 60})
    assert torch.equal(ActivationCache(tmp_path).read_rows(torch.arange(60)), rows)


@pytest.mark.parametrize("folder", ["/sys/store", "/dev/null/store"])
def test_a_folder_that_cannot_be_written_is_refused(folder):
    with pytest.raises(StoreError, match=f"store '{folder}' cannot be written: ") as error:
        ActivationCacheWriter(folder, manifest_of())
    assert "\n" not in str(error.value)


def test_activations_that_are_not_finite_are_refused(tmp_path):
    rows = rows_of(10)
    rows[3, 0, 0, 0] = torch.nan
    with (
        pytest.raises(StoreError, match="is not finite"),
        ActivationCacheWriter(tmp_path, manifest_of()) as writer,
    ):
        writer.append(rows, {"next": 10})


@given(st.integers(1, 3000), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_permuted_is_a_permutation(n, seed):
    assert torch.equal(permuted(torch.arange(n), n, seed).sort().values, torch.arange(n))


def test_permuted_looks_random():
    n = 20_000
    order = permuted(torch.arange(n), n, 1)
    correlation = torch.corrcoef(torch.stack([order, torch.arange(n)]).double())[0, 1]
    neighbours = (order[1:] - order[:-1]).abs().double().mean() / n
    assert abs(correlation) < 0.03
    assert abs(neighbours - 1 / 3) < 0.02
    assert not torch.equal(order, permuted(torch.arange(n), n, 2))


@given(st.integers(1, 400), st.integers(1, 50), st.integers(1, 500))
@settings(max_examples=150, deadline=None)
def test_windows_hold_every_row_once(n_rows, block, window):
    order = WindowedOrder(n_rows, block, window, seed=3)
    rows, place = [], 0
    while place < n_rows:
        first, end = order.bounds(place)
        assert first == place
        assert end - first < max(window, block) + block
        assert {order.bounds(inside) for inside in range(first, end)} == {(first, end)}
        held_R = order.rows_R(first, end)
        assert torch.equal(held_R.sort().values, held_R)
        picks = torch.cat([order.picks_B(first, end, torch.tensor([i])) for i in range(first, end)])
        assert torch.equal(picks, order.picks_B(first, end, torch.arange(first, end)))
        rows.append(held_R[picks])
        place = end
    assert torch.equal(torch.cat(rows).sort().values, torch.arange(n_rows))


@pytest.mark.parametrize(("block", "window"), [(1, 1000), (16, 1000), (16, 100_000)])
def test_rows_of_a_window_come_from_everywhere_and_are_parted(block, window):
    n_rows = 20_000
    order = WindowedOrder(n_rows, block, window, seed=1)
    rows = []
    while len(rows) < n_rows:
        first, end = order.bounds(len(rows))
        held_R = order.rows_R(first, end)
        assert abs(float(held_R.double().mean()) / n_rows - 0.5) < 0.12
        rows += held_R[order.picks_B(first, end, torch.arange(first, end))].tolist()
    step = torch.tensor(rows).diff().abs()
    side_by_side = float((step == 1).double().mean())
    expected = 2 / n_rows if block == 1 or window > n_rows else 2 * (block - 1) / block / window
    assert side_by_side < 2 * expected + 0.001
    assert abs(float(step.double().mean()) / n_rows - 1 / 3) < 0.02


@pytest.mark.parametrize(("width", "block"), [(12, 16), (576, 14), (1536, 5), (16_384, 1)])
def test_a_read_is_some_kilobytes_by_default(tmp_path, width, block):
    with ActivationCacheWriter(tmp_path, manifest_of(dims=[1, 1, width])) as writer:
        writer.append(torch.randn(4, 1, 1, width), {"next": 4})
    assert StoredRows(ActivationCache(tmp_path)).read_block == block
    with pytest.raises(InputError, match="window: 0 is below 1"):
        StoredRows(ActivationCache(tmp_path), window=0)


def take(stream, n):
    return torch.cat([next(stream).acts_RMPD for _ in range(n)])


@pytest.mark.parametrize("window", [1, 20, 1000])
@pytest.mark.parametrize("read_block", [1, 7, 200])
def test_stored_rows_read_every_row_once_an_epoch(tmp_path, read_block, window):
    rows = rows_of(95)
    source = StoredRows(write(tmp_path, rows), epochs=2, rows_per_read=10, read_block=read_block, window=window)
    items = list(source.open())
    assert [item.epoch for item in items][:1] + [item.epoch for item in items][-1:] == [0, 1]
    acts = torch.cat([item.acts_RMPD for item in items])
    for epoch in (acts[:95], acts[95:]):
        assert torch.equal(epoch[:, 0, 0, 0].sort().values, rows[:, 0, 0, 0].sort().values)
    assert not torch.equal(acts[:95], acts[95:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("window", [24, 1000])
@pytest.mark.parametrize("n_stores", [1, 3])
def test_stored_rows_continue_exactly(tmp_path, n_stores, window, dtype):
    stores = [write(tmp_path / str(i), rows_of(50 + i, i), dtype=dtype) for i in range(n_stores)]
    make = lambda: StoredRows(stores, rows_per_read=16, seed=2, read_block=4, window=window)  # noqa: E731
    expected = make().open()
    interrupted = make().open()
    assert torch.equal(take(expected, 9), take(interrupted, 9))
    resumed = make().open(interrupted.state_dict())
    assert torch.equal(take(expected, 12), take(resumed, 12))


def test_mixing_follows_the_weights(tmp_path):
    stores = [write(tmp_path / str(i), torch.full((40, *DIMS), float(i + 1))) for i in range(2)]
    values = take(StoredRows(stores, weights=[1, 3], rows_per_read=200).open(), 20)[:, 0, 0, 0]
    assert abs(float((values == 2).float().mean()) - 0.75) < 0.03
    scaling = StoredRows(stores, weights=[1, 3]).scaling_MP()
    torch.testing.assert_close(scaling, torch.full((2, 1), 1 / 1.75))


def test_bad_mixtures_are_refused(tmp_path):
    one = write(tmp_path / "one", rows_of(40))
    text = {"sequence_length": 8, "seed": 0, "dataset": "another text"}
    two = write(tmp_path / "two", rows_of(40), tokens=text)
    three = write(tmp_path / "three", rows_of(40), tokenizer="u")
    StoredRows([one, two])
    with pytest.raises(StoreError, match="tokenizer is 'u' in the store and 't' in this run"):
        StoredRows([one, three])
    with pytest.raises(InputError, match="weights"):
        StoredRows([one, two], weights=[1.0])
    with pytest.raises(InputError, match="at least one"):
        StoredRows([])


def test_a_store_is_not_begun_among_other_files(tmp_path):
    (tmp_path / "thesis.tmp").write_text("years of work")
    with pytest.raises(StoreError, match=r"is not a store, but holds files already \(thesis.tmp\)"):
        write(tmp_path, rows_of(4))
    assert (tmp_path / "thesis.tmp").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "thesis.tmp"]


@pytest.mark.parametrize(
    "name", ["manifest.json", "lock", "shard-000000.safetensors", "resume-000009-abcdef01.safetensors", "x"]
)
def test_links_in_a_store_are_refused_and_nothing_is_written_through_one(name, tmp_path):
    store, mine = tmp_path / "store", tmp_path / "mine"
    write(store, rows_of(40))
    mine.write_text("years of work")
    (store / name).unlink(missing_ok=True)
    (store / name).symlink_to(mine)
    for use in (
        ActivationCache,
        lambda path: write(path, rows_of(40)),
        lambda path: check_can_write(path, manifest_of()),
    ):
        with pytest.raises(StoreError, match=rf"{name}' is a link"):
            use(store)
    assert mine.read_text() == "years of work" and (store / name).is_symlink()


def test_only_leftovers_of_exactly_our_names_are_cleaned_up(tmp_path):
    write(tmp_path, rows_of(40), finish=False)
    mine = [
        "shard-mine.safetensors.tmp",
        "resume-000001-mine.safetensors",
        "resume-notes.safetensors",
        ".crosscode-tmp-x",
    ]
    for name in mine:
        (tmp_path / name).write_text("years of work")
    (tmp_path / ".crosscode-tmp-manifest.json-abcd1234").write_text("half")
    write(tmp_path, rows_of(40))
    assert all((tmp_path / name).read_text() == "years of work" for name in mine)
    assert not (tmp_path / ".crosscode-tmp-manifest.json-abcd1234").exists()
