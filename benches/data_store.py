"""The activation store: reading against harvesting again, memory, size on disk, and what int8 costs.

R rows · B batch · M models · P hookpoints · D model dimension.

    python benches/data_store.py [rounds] [folder]
    python benches/data_store.py distant          # a store that takes 20 ms a request, against a local one

Real activations of SmolLM2-135M (blocks.14.hook_resid_post) are harvested once and written several times over, so
that the store is larger than any processor cache; everything is read from the page cache, in one thread.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from data_common import interleaved, report, smollm2_path

from crosscode.data import (
    ActivationCache,
    ActivationCacheWriter,
    ActivationHarvester,
    ActivationsDataloader,
    StoredRows,
    TokenSequenceLoader,
    load_language_model,
    make_manifest,
    wrap_documents,
)
from crosscode.data.rows import HarvestedRows
from crosscode.data.store.format import Layout, pack, unpack

HOOKPOINT = "blocks.14.hook_resid_post"
B = 2048
MEMORY_PROBE = """
import sys, torch
torch.set_num_threads(1)
from crosscode.data import ActivationCache, ActivationsDataloader, StoredRows
def resident(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1024
loader = ActivationsDataloader(StoredRows(ActivationCache(sys.argv[1]), epochs=1), batch_size=2048)
iterator = iter(loader)
next(iterator)
before, peak = resident(), 0.0
for _ in iterator: peak = max(peak, resident())
print(peak, peak - before)
"""


def main(rounds: int, folder: Path) -> None:
    model = load_language_model(str(smollm2_path()), dtype="float32")
    harvester = ActivationHarvester([model], [HOOKPOINT])
    tokens = token_loader(model.tokenizer)
    source = HarvestedRows(tokens, harvester)
    stream = source.open()
    acts_RMPD = torch.cat([next(stream).acts_RMPD for _ in range(4)])
    stores = {
        f"{dtype} x{times}": write(folder, tokens, harvester, acts_RMPD, dtype, times)
        for dtype, times in (("float32", 50), ("float32", 200), ("bfloat16", 200), ("int8", 200))
    }
    table = speed(stores, source, rounds)
    for row in table:
        if row["way"] in stores:
            store = stores[row["way"]]
            row |= {"on_disk_MB": size_of(store) / 1e6, "overhead_percent": overhead(store), **memory(store)}
    report("data_store", table, hookpoint=HOOKPOINT, batch=B, rounds=rounds, codec=codec_errors(acts_RMPD))


def distant(folder: Path) -> None:
    """Activations per second out of memory behind 20 ms a request, and out of a local folder: shuffled batches, one epoch, and no
    work on them."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Distant(MemoryFileSystem):
        protocol, cachable, store, pseudo_dirs = "distant", False, {}, [""]

        def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
            time.sleep(0.02)
            return super().cat_file(path, start=start, end=end)

    fsspec.register_implementation("distant", Distant)
    table = []
    for dims, n_rows in (((1, 1, 576), 400_000), ((1, 1, 128), 1_200_000), ((2, 2, 768), 150_000)):
        manifest = {
            "format": "crosscode-activations", "version": 2, "tokenizer": "t", "dims": list(dims), "dtype": "float32",
            "models": [{"name": str(m), "weights": str(m), "dtype": "float32", "revision": None} for m in range(dims[0])],
            "hookpoints": [f"h{p}" for p in range(dims[1])], "activation_dtype": "float32",
            "tokens": {"sequence_length": 8, "seed": 0, "dataset": "d"}, "sources": [{"name": "s"}],
        }  # fmt: skip
        name = "x".join(map(str, dims))
        near, far = str(folder / name), f"distant://bucket/{name}"
        for where in (near, far):
            with ActivationCacheWriter(where, manifest, shard_bytes=64 << 20) as writer:
                for i in range(0, n_rows, 10_000):
                    writer.append(torch.randn(10_000, *dims), {"next": i})
        sources = {
            "local": StoredRows(ActivationCache(near)), "20 ms": StoredRows(ActivationCache(far)),
            "20 ms, blocks of a local store": StoredRows(ActivationCache(far), read_block=None),
        }  # fmt: skip
        n_batches = n_rows // B
        loaders = {way: iter(ActivationsDataloader(source, batch_size=B)) for way, source in sources.items()}
        times = interleaved({way: partial(take, batches, n_batches) for way, batches in loaders.items()}, 3)
        for way, source in sources.items():
            rate = n_batches * B / times[way].wall
            table.append(
                {
                    "row": name, "way": way, "block": source.read_block, "activations_per_s": rate,
                    "GB_per_s": rate * source.stores[0].layout.row_bytes / 1e9,
                    "of_local": times["local"].wall / times[way].wall,
                }
            )  # fmt: skip
        Distant.store.clear()
    report("data_store_distant", table, batch=B, seconds_a_request=0.02)


def token_loader(tokenizer: Any) -> TokenSequenceLoader:
    """Source files of the standard library: text that every Python carries."""
    files = sorted(Path(torch.__file__).parents[1].glob("torch/*.py"))[:40]
    texts = [file.read_text(errors="ignore") for file in files]
    return TokenSequenceLoader(wrap_documents(texts), tokenizer, sequence_length=512, batch_size=2)


def write(
    folder: Path, tokens: Any, harvester: Any, acts_RMPD: torch.Tensor, dtype: str, times: int
) -> ActivationCache:
    path = folder / f"{dtype}-{times}"
    with ActivationCacheWriter(path, make_manifest(tokens, harvester, dtype=dtype)) as writer:
        for i in range(times):
            writer.append(acts_RMPD, {"copy": i})
    return ActivationCache(path)


def speed(stores: dict[str, ActivationCache], source: HarvestedRows, rounds: int) -> list[dict[str, Any]]:
    """Batches as training gets them: shuffled, checked, scaled, float32. An epoch a round, every window in it."""
    loaders = {}
    for name, store in stores.items():
        loaders[name] = ActivationsDataloader(StoredRows(store), batch_size=B)
        loaders[f"{name}, blocks of 1"] = ActivationsDataloader(StoredRows(store, read_block=1), batch_size=B)
    n_batches = {name: loader.rows.n_rows // B for name, loader in loaders.items()}
    actions: dict[str, Any] = {name: partial(take, iter(loader), n_batches[name]) for name, loader in loaders.items()}
    live, harvested = source.open(), []
    actions["harvest again"] = lambda: harvested.append(next(live).acts_RMPD.shape[0])
    times = interleaved(actions, rounds)
    n_rows = {name: n * B for name, n in n_batches.items()} | {"harvest again": sum(harvested) / len(harvested)}
    gigabytes = {name: n * source.dims[2] * 4 / 1e9 for name, n in n_rows.items()}
    harvest_rate = n_rows["harvest again"] / times["harvest again"].wall
    return [
        {
            "way": name,
            "activations_per_s": n_rows[name] / time.wall,
            "GB_per_s": gigabytes[name] / time.wall,
            "at_best": gigabytes[name] / time.best,
            "GB_per_cpu_s": gigabytes[name] / time.cpu,
            "times_harvest": n_rows[name] / time.wall / harvest_rate,
        }
        for name, time in times.items()
    ]


def take(iterator: Iterator[torch.Tensor], n_batches: int) -> None:
    for _ in range(n_batches):
        next(iterator)


def size_of(store: ActivationCache) -> int:
    return sum(file.stat().st_size for file in store.path.iterdir())


def overhead(store: ActivationCache) -> float:
    """Percent of everything in the folder above the tensors themselves (values, and scales for int8)."""
    raw = store.n_rows * (store.layout.row_bytes - 4)
    return 100 * (size_of(store) / raw - 1)


def memory(store: ActivationCache) -> dict[str, float]:
    """Resident memory of a fresh process while it reads every row once."""
    out = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE, str(store.path)], capture_output=True, text=True, check=True
    )
    peak, growth = map(float, out.stdout.split())
    return {"peak_resident_MB": peak, "grown_while_reading_MB": growth}


def codec_errors(acts_RMPD: torch.Tensor) -> dict[str, dict[str, float]]:
    """What each dtype on disk costs: the share of the variance that it loses, and FVU on the exact activations of a
    second half after fitting a rank-64 linear autoencoder to the stored activations of the first."""
    fitted_RD, heldout_RD = acts_RMPD[:, 0, 0].chunk(2)
    table = {}
    for dtype in ("float32", "bfloat16", "int8"):
        layout = Layout((1, 1, fitted_RD.shape[1]), dtype)
        stored_RD = unpack(pack(fitted_RD[:, None, None], dtype), layout).float()[:, 0, 0]
        mean_D = stored_RD.mean(dim=0)
        basis_DK = torch.linalg.svd(stored_RD - mean_D, full_matrices=False).Vh[:64].T
        centred_RD = heldout_RD - mean_D
        residual_RD = centred_RD - centred_RD @ basis_DK @ basis_DK.T
        table[dtype] = {
            "variance_lost": fraction(stored_RD - fitted_RD, fitted_RD),
            "fvu_of_rank_64_fit": fraction(residual_RD, heldout_RD),
        }
    print(f"cost of the dtype on disk: {table}")
    return table


def fraction(error_RD: torch.Tensor, acts_RD: torch.Tensor) -> float:
    return float(error_RD.square().sum() / (acts_RD - acts_RD.mean(dim=0)).square().sum())


if __name__ == "__main__":
    torch.set_num_threads(1)
    is_distant = sys.argv[1:2] == ["distant"]
    n_rounds = int(sys.argv[1]) if len(sys.argv) > 1 and not is_distant else 5
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as temporary:
        distant(Path(temporary)) if is_distant else main(n_rounds, Path(temporary))
