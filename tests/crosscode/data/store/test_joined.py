"""Stores that were harvested apart, joined, are the store that was harvested at once."""

import json
from functools import partial

import pytest
import torch

from crosscode.data import (
    ActivationCache,
    ActivationHarvester,
    StoredRows,
    StoreError,
    TokenSequenceLoader,
    harvest_to_store,
    wrap_documents,
)
from crosscode.data.store import manifest as manifests
from crosscode.data.store.joined import JoinedStores
from crosscode.data.store.token_hash import TokenHash

NAMES = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


@pytest.fixture
def store(tmp_path, model_pair, tokenizer, documents):
    """`store(name, models=(0, 1), hookpoints=NAMES, ...)` harvests into a folder."""

    def make(
        name,
        models=(0, 1),
        hookpoints=NAMES,
        *,
        seed=1,
        max_rows=None,
        documents=documents,
        harvested="float32",
        **store,
    ):
        loader = TokenSequenceLoader(
            wrap_documents(documents), tokenizer, sequence_length=8, batch_size=4, epochs=1, seed=seed
        )
        harvester = ActivationHarvester([model_pair[m] for m in models], hookpoints, dtype=harvested)
        return harvest_to_store(loader, harvester, tmp_path / name, max_rows=max_rows, **store).path

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("along", ["models", "hookpoints"])
def test_joined_stores_are_the_store_of_both(along, dtype, store):
    parts = [{"models": (i,)} if along == "models" else {"hookpoints": [NAMES[i]]} for i in (0, 1)]
    sizes = (3_000, 50_000)  # the shards end elsewhere
    apart = [store(f"part{i}", **part, dtype=dtype, shard_bytes=sizes[i]) for i, part in enumerate(parts)]
    whole, joined = ActivationCache(store("whole", dtype=dtype)), JoinedStores(apart)
    assert joined.dims == whole.dims == (2, 2, 16)
    assert joined.manifest == whole.manifest
    index_B = torch.randperm(whole.n_rows, generator=torch.Generator().manual_seed(0))
    assert torch.equal(joined.read_rows(index_B), whole.read_rows(index_B))
    torch.testing.assert_close(joined.scaling_MP(), whole.scaling_MP())
    one, two = (StoredRows(rows, epochs=1, rows_per_read=64, read_block=4, window=100) for rows in (joined, whole))
    for mine, theirs in zip(one.open(), two.open(), strict=True):
        assert torch.equal(mine.acts_RMPD, theirs.acts_RMPD)


def test_stores_of_other_tokens_or_columns_are_refused(store, documents):
    first = store("first", models=(0,))
    for name, options, message in (
        ("seed", {"seed": 2}, "cannot be joined: seed is 1 in the first and 2 in the second"),
        ("short", {"max_rows": 40}, "harvest both to the same --n-tokens"),
        ("text", {"documents": documents[:-1]}, "dataset is"),
        ("bfloat16", {"dtype": "bfloat16"}, "dtype is 'float32' in the first and 'bfloat16' in the second"),
        (
            "rounded",
            {"harvested": "bfloat16"},
            "activation_dtype is 'float32' in the first and 'bfloat16' in the second",
        ),
        ("hookpoint", {"hookpoints": NAMES[:1]}, "neither the same hookpoints nor the same models"),
    ):
        with pytest.raises(StoreError, match=message):
            JoinedStores([first, store(name, **{"models": (1,), **options})])
    with pytest.raises(StoreError, match="two of them hold the same model"):
        JoinedStores([first, store("again", models=(0,))])


def test_rows_of_other_tokens_are_found_by_their_hash(store, documents, monkeypatch):
    """Where two manifests agree: a text whose fingerprint does not tell what it says."""
    first = store("first", models=(0,))
    lie = json.loads((first / "manifest.json").read_text())["tokens"]
    make = manifests.make_manifest
    monkeypatch.setattr(
        "crosscode.data.store.harvest.make_manifest", lambda *args, **kwargs: {**make(*args, **kwargs), "tokens": lie}
    )
    swapped = store("swapped", models=(1,), documents=[documents[1], documents[0], *documents[2:]])
    with pytest.raises(StoreError, match="their rows are of other tokens"):
        JoinedStores([first, swapped])


def test_the_hash_is_the_polynomial_however_the_ids_are_cut():
    ids = torch.randint(50_000, (97,), generator=torch.Generator().manual_seed(0))
    expected = 0
    for token in ids.tolist():
        expected = (expected * 0x9E3779B97F4A7C15 + token + 1) % (1 << 64)
    for cuts in ([97], [0, 97], [1, 40, 56], [96, 1]):
        found = TokenHash()
        for part in ids.split(cuts):
            found = found.with_tokens(part)
        assert found.value == expected
        assert TokenHash.after(str(found)) == found
    assert TokenHash.after(None) is None
    assert TokenHash().with_tokens(None) is None


def test_a_store_that_goes_on_has_the_hash_of_one_in_one_go(store):
    whole = ActivationCache(store("whole"))
    make = partial(store, "cut", shard_bytes=2_000)
    make(max_rows=60)
    cut = ActivationCache(make())
    assert cut.shards[-1].token_hash == whole.shards[-1].token_hash is not None
