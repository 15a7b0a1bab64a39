"""Stores on file systems of fsspec: what local ones do, and what latency, errors and other writers do to them."""

import random
import sys
import threading
import time
import uuid
from functools import partial
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from crosscode.data import ActivationCache, ActivationCacheWriter, StoredRows, StoreError
from crosscode.data.store import claim
from crosscode.data.store.beginning import check_can_write
from crosscode.data.store.format import Layout
from crosscode.data.store.joined import JoinedStores
from crosscode.data.store.place import absolute, place
from crosscode.data.text.labels import Labels
from crosscode.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[3] / "helpers"))

from object_stores import SERVERS

DIMS = (2, 1, 12)
MODELS = [{"name": n, "revision": None, "weights": w, "dtype": "float32"} for n, w in (("a", "11"), ("b", "22"))]
MANIFEST = {
    "format": "crosscode-activations", "version": 2, "models": MODELS, "tokenizer": "t",
    "hookpoints": ["blocks.0.hook_resid_post"], "dims": list(DIMS), "dtype": "float32",
    "activation_dtype": "float32", "tokens": {"sequence_length": 8, "seed": 0, "dataset": "d"}, "sources": [{"name": "s"}],
}  # fmt: skip


class Faulty(MemoryFileSystem):
    """Memory behind a bad network: a share of all requests fails, answers late or is cut; some that fail have been done."""

    protocol = "faulty"
    cachable = False
    share, seconds, n_at_once, most_at_once, random = 0.0, 0.0, 0, 0, random.Random(0)
    lock = threading.Lock()

    def _fails(self, what):
        cls = type(self)
        with cls.lock:
            cls.n_at_once += 1
            cls.most_at_once = max(cls.most_at_once, cls.n_at_once)
            fails, kind = cls.random.random() < cls.share, cls.random.randrange(2)
        time.sleep(cls.seconds)
        with cls.lock:
            cls.n_at_once -= 1
        if fails:
            raise (TimeoutError, ConnectionResetError)[kind](f"injected: {what}")

    def cat_file(self, path, start=None, end=None, **kwargs):
        self._fails("read")
        content = super().cat_file(path, start=start, end=end)
        return content[: len(content) // 2] if type(self).random.random() < self.share / 2 else content

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        if type(self).random.random() < self.share / 2:
            super().pipe_file(path, value[: len(value) // 2], mode=mode)
            raise TimeoutError("injected: cut while it was written")
        super().pipe_file(path, value, mode=mode)
        self._fails("write, though it was done")

    def info(self, path, **kwargs):
        self._fails("info")
        return super().info(path, **kwargs)

    def ls(self, path, detail=True, **kwargs):
        self._fails("list")
        return super().ls(path, detail=detail, **kwargs)


fsspec.register_implementation("faulty", Faulty)


@pytest.fixture
def faulty(monkeypatch):
    monkeypatch.setattr(Faulty, "store", {})
    monkeypatch.setattr(Faulty, "pseudo_dirs", [""])
    for name, value in (("share", 0.0), ("seconds", 0.0), ("most_at_once", 0), ("random", random.Random(0))):
        monkeypatch.setattr(Faulty, name, value)
    monkeypatch.setattr("crosscode.data.store.place._FIRST_PAUSE", 0.001)
    return "faulty://bucket/store"


@pytest.fixture
def url():
    name = f"memory://{uuid.uuid4().hex}"
    yield f"{name}/store"
    fsspec.filesystem("memory").rm(name, recursive=True)


def rows_of(n):
    return torch.randn(n, *DIMS, generator=torch.Generator().manual_seed(0))


def write(path, rows, *, dtype="float32", shard_rows=30, finish=True, manifest=MANIFEST):
    bytes_per_row = Layout(DIMS, dtype).row_bytes
    with ActivationCacheWriter(path, {**manifest, "dtype": dtype}, shard_bytes=shard_rows * bytes_per_row) as writer:
        for first in range(writer.n_rows, len(rows), 10):
            part = rows[first : first + 10]
            labels = Labels.unpacked(torch.zeros(len(part), 3, dtype=torch.int32))
            writer.append(part, {"next": first + 10}, torch.arange(len(part)), labels)
        if finish:
            writer.finish()
    return ActivationCache(path)


def contents(path):
    """But positions: safetensors writes their two entries in any order."""
    found = {each.name: each for each in place(path).iterdir() if each.name != "lock"}
    return {name: each.read_bytes() for name, each in found.items() if not name.startswith("resume-")}


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_remote_stores_are_local_ones_to_the_byte(tmp_path, url, dtype):
    here, there = write(tmp_path, rows_of(95), dtype=dtype), write(url, rows_of(95), dtype=dtype)
    assert contents(tmp_path) == contents(url)
    index_B = torch.randint(95, (200,))
    assert torch.equal(here.read_rows(index_B), there.read_rows(index_B))
    there.verify()
    assert torch.equal(here.labels().packed_R3(), there.labels().packed_R3())
    assert write(url, rows_of(95), dtype=dtype).n_rows == 95  # complete: left alone
    assert contents(tmp_path) == contents(url)


def test_rows_are_shuffled_and_resumed_as_local_ones(tmp_path, url):
    for path in (tmp_path, url):
        write(path, rows_of(95))
    drawn = {}
    for path in (tmp_path, url):
        rows = StoredRows(ActivationCache(path), epochs=2, rows_per_read=7, read_block=3, window=30, seed=4)
        stream = rows.open()
        drawn[path] = [next(stream).acts_RMPD for _ in range(8)]
        state = stream.state_dict()
        stream.close()
        drawn[path] += [each.acts_RMPD for each in rows.open(state)]
    assert torch.equal(*map(torch.cat, drawn.values()))
    assert sum(map(len, drawn[url])) == 190


def test_blocks_of_remote_stores_are_worth_a_request(tmp_path, url):
    near, far = write(tmp_path, rows_of(95)), write(url, rows_of(95))
    blocks = [StoredRows(of, read_block=block).read_block for of in (near, far) for block in ("auto", None, 7)]
    assert blocks == [16, 16, 7, 256, 16, 7]  # null: as runs of earlier versions have it
    assert StoredRows([near, far], window=1 << 21).read_block == (512 << 10) // far.layout.row_bytes
    assert StoredRows(far, window=100).read_block == 16


def test_joined_remote_stores_are_one(url):
    rows = rows_of(95)
    parts = [{**MANIFEST, "models": [model], "dims": [1, 1, 12]} for model in MODELS]
    for i, manifest in enumerate(parts):
        with ActivationCacheWriter(f"{url}-{i}", manifest, shard_bytes=1000) as writer:
            writer.append(rows[:, i : i + 1], {})
    assert torch.equal(JoinedStores([f"{url}-0", f"{url}-1"]).read_rows(torch.arange(95)), rows)


def test_a_store_is_there_once_its_harvest_has_ended(url):
    writer = ActivationCacheWriter(url, MANIFEST, shard_bytes=1000)
    writer.append(rows_of(50), {"next": 50})
    assert writer.n_shards == 1
    with pytest.raises(StoreError, match="its harvest has not ended"):
        ActivationCache(url)
    with pytest.raises(StoreError, match="there is no manifest"):
        ActivationCache(url + "x")
    assert ActivationCache(url, unfinished=True).n_rows == 50
    writer.close()
    assert ActivationCache(url).n_rows == 50
    assert not any("unfinished" in name or name == claim.MARKER for name in contents(url))


def test_a_killed_writer_is_watched_then_followed(url, monkeypatch):
    monkeypatch.setattr(claim, "_BEAT", 0.05)
    monkeypatch.setattr(claim, "_LEASE", 0.5)
    first = ActivationCacheWriter(url, MANIFEST, shard_bytes=1000)
    first.append(rows_of(95)[:50], {"next": 50})
    with pytest.raises(StoreError, match=r"is being written by another process \(process \d+ on"):
        ActivationCacheWriter(url, MANIFEST)
    held = first._lock.pop_all()._exit_callbacks[0][1].__self__.thing  # as kill -9 leaves it: the marker lies there
    held._stop.set()
    held._thread.join()
    assert torch.equal(write(url, rows_of(95)).read_rows(torch.arange(95)), rows_of(95))
    with pytest.raises(StoreError, match="another process's by now"):  # it was only asleep
        first.append(rows_of(95)[:10], {})


def test_of_two_that_begin_one_writes(url):
    made, refused = [], []

    def begin():
        try:
            made.append(ActivationCacheWriter(url, MANIFEST))
        except StoreError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=begin) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert (len(made), len(refused)) == (1, 2)
    made[0].close()


def test_nothing_of_others_is_touched(url):
    files = fsspec.filesystem("memory")
    files.pipe_file(f"{url}/notes.txt", b"mine")
    with pytest.raises(StoreError, match=r"holds files already .notes.txt"):
        ActivationCacheWriter(url, MANIFEST)
    assert [*contents(url)] == ["notes.txt"]
    files.rm_file(f"{url}/notes.txt")
    writer = ActivationCacheWriter(url, MANIFEST)
    files.pipe_file(f"{url}/shard-000000.safetensors", b"not ours")
    writer.append(rows_of(10), {})
    with pytest.raises(StoreError, match=r"cannot be written: .*exists"):
        writer.flush()
    writer._release()
    assert contents(url)["shard-000000.safetensors"] == b"not ours"


def test_a_bad_network_changes_nothing(faulty, tmp_path, monkeypatch):
    monkeypatch.setattr("crosscode.data.store.place._TRIES", 12)
    Faulty.share = 0.3
    for path in (tmp_path, faulty):
        write(path, rows_of(95))
    ActivationCache(faulty).verify()
    stream = StoredRows(ActivationCache(faulty), epochs=1, read_block=3, window=30).open()
    local = StoredRows(ActivationCache(tmp_path), epochs=1, read_block=3, window=30).open()
    assert torch.equal(*(torch.cat([each.acts_RMPD for each in of]) for of in (stream, local)))
    Faulty.share = 0.0
    assert contents(faulty) == contents(tmp_path)


def test_what_fails_for_good_is_one_line(faulty):
    cache = write(faulty, rows_of(95))
    Faulty.share = 1.0
    with pytest.raises(OSError, match=r"tried 4 times.*faulty://bucket/store/shard-000000") as failed:
        cache.read_rows(torch.arange(5))
    assert "\n" not in str(failed.value)
    with pytest.raises(StoreError, match=r"cannot be written: .*tried 4 times"):
        ActivationCacheWriter(faulty, MANIFEST)


def test_damage_is_said(url):
    write(url, rows_of(95))
    files, shard = fsspec.filesystem("memory"), f"{url}/shard-000001.safetensors"
    content = files.cat_file(shard)
    files.pipe_file(shard, content[:-200] + bytes([content[-200] ^ 1]) + content[-199:])
    with pytest.raises(StoreError, match="checksum"):
        ActivationCache(url).verify()
    files.pipe_file(shard, content[:-8])
    with pytest.raises(StoreError, match=r"shard-000001.*bytes long"):
        ActivationCache(url)
    files.rm_file(shard)
    with pytest.raises(StoreError, match=r"shard-000001.*missing"):
        ActivationCache(url)


def test_requests_are_many_at_once_and_bounded(faulty, monkeypatch):
    monkeypatch.setattr("crosscode.data.store.place._LARGEST", 500)
    cache = write(faulty, rows_of(600), shard_rows=600)
    Faulty.seconds, Faulty.most_at_once = 0.005, 0
    cache.read_rows(torch.arange(600))
    assert 16 < Faulty.most_at_once <= 256


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nosuch://bucket/store", "nosuch"),
        ("ftp://me:secret@host/store", "has a password"),
        ("memory://", "names no folder"),
    ],
)
def test_bad_places_are_one_line(path, said):
    with pytest.raises(InputError, match=said) as error:
        place(path)
    assert "secret" not in str(error.value)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    registry = __import__("importlib").import_module("fsspec.registry")
    monkeypatch.setattr(registry, "_registry", {})
    with pytest.raises(InputError, match=r"pip install 'crosscode\[s3\]'"):
        place("s3://bucket/store")


def test_files_are_local_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert place(f"file://{tmp_path}/a") == tmp_path / "a"
    assert absolute("a") == absolute(f"file://{tmp_path}/a") == str(tmp_path / "a")
    assert absolute("s3://bucket/a") == "s3://bucket/a"


@pytest.fixture(scope="module", params=SERVERS)
def bucket(request):
    with SERVERS[request.param]() as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        fsspec.filesystem(request.param).mkdir("bucket")
        yield f"{request.param}://bucket"


def test_a_bucket_holds_what_a_folder_does(bucket, tmp_path):
    with pytest.raises(StoreError, match="no such store"):
        ActivationCache(f"{bucket}/store")
    write(f"{bucket}/store", rows_of(95)[:45], finish=False)
    for path in (tmp_path, f"{bucket}/store"):
        cache = write(path, rows_of(95))
    cache.verify()
    assert torch.equal(cache.read_rows(torch.arange(95)), rows_of(95))
    writer = ActivationCacheWriter(f"{bucket}/other", MANIFEST)
    with pytest.raises(FileExistsError):
        (place(f"{bucket}/other") / claim.MARKER).write(b"", new=True)
    writer.close()


@pytest.mark.parametrize("name", ["a b", "ü", "a?b=1", "a#b", "a%20b", "a[1]*", "a&b+c"])
def test_any_name_will_do(bucket, url, name):
    for folder in (f"{bucket}/{name}", f"{url}/{name}"):
        assert torch.equal(write(folder, rows_of(35)).read_rows(torch.arange(35)), rows_of(35))
        assert len(contents(folder)) == 3


def test_what_cannot_be_written_is_said_by_a_look(bucket, monkeypatch):
    files, protocol = place(f"{bucket}/a").files, bucket.partition(":")[0]
    wanted = {name: MANIFEST[name] for name in ("models", "hookpoints")}
    with pytest.raises(StoreError, match=r"nowhere/store' cannot be written: .*bucket"):
        check_can_write(f"{protocol}://nowhere/store", wanted)
    assert check_can_write(f"{bucket}/new", wanted) is None
    assert files.find("bucket/new") == []  # the marker went again
    writer = ActivationCacheWriter(f"{bucket}/held", MANIFEST)
    with pytest.raises(StoreError, match="being written by another process"):
        check_can_write(f"{bucket}/held", wanted)
    check_can_write(f"{bucket}/held", wanted, to_hold=False)
    writer.close()
    monkeypatch.setattr(files, "pipe_file", refuse)
    with pytest.raises(StoreError, match=r"cannot be written: may not"):
        check_can_write(f"{bucket}/read-only", wanted)


def test_missing_credentials_are_one_line(bucket, monkeypatch):
    if not bucket.startswith("s3"):
        pytest.skip("its double asks for none")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr("crosscode.data.store.place._FIRST_PAUSE", 0.001)
    fsspec.filesystem("s3").clear_instance_cache()
    for begin in (lambda: ActivationCache(f"{bucket}/store"), lambda: check_can_write(f"{bucket}/store", MANIFEST)):
        with pytest.raises(InputError, match="Unable to locate credentials") as error:
            begin()
        assert "\n" not in str(error.value)
    fsspec.filesystem("s3").clear_instance_cache()


def refuse(*arguments, **options):
    raise PermissionError("may not")


def test_large_shards_go_in_parts_that_may_fail(bucket, monkeypatch):
    if not bucket.startswith("s3"):
        pytest.skip("GCS takes them whole or not")
    where, content = place(f"{bucket}/parts"), bytes(range(256)) * (11 << 12)
    call, put, failures = where.files._call_s3, where.files.pipe_file, []

    async def fails(method, *arguments, **options):
        if method == "upload_part" and options["PartNumber"] == 2 and len(failures) < n_failures:
            failures.append(method)
            raise OSError("500: Internal Error")
        return await call(method, *arguments, **options)

    monkeypatch.setattr(where.files, "_call_s3", fails)
    monkeypatch.setattr(where.files, "pipe_file", partial(put, chunksize=5 << 20))
    monkeypatch.setattr("crosscode.data.store.place._FIRST_PAUSE", 0.001)
    n_failures = 99
    with pytest.raises(OSError, match=r"500: Internal Error \(tried 4 times\)"):
        where.write(content, new=True)
    assert not where.exists()
    n_failures = len(failures) + 2
    where.write(content, new=True)
    assert where.read_bytes() == content
    left = fsspec.asyn.sync(where.files.loop, call, "list_multipart_uploads", Bucket="bucket")
    assert not left.get("Uploads")
    with pytest.raises(FileExistsError):
        where.write(content[:-1] + b"x", new=True)
    assert where.read_bytes() == content
