"""Stores know of each row its role, text and document; earlier ones are read and gone on with as they are."""

import json

import pytest
import torch

from crosscode.data import ActivationHarvester, TokenSequenceLoader, wrap_documents
from crosscode.data.store.harvest import harvest_to_store
from crosscode.data.store.joined import JoinedStores
from crosscode.data.store.manifest import read_manifest, write_manifest
from crosscode.data.store.reader import ActivationCache
from crosscode.data.text.mixture import MixedDocuments
from crosscode.errors import InputError

TEMPLATE = "{% for m in messages %}{{ ' ' + m['role'] + ' ' + m['content'] + ' <pad>' }}{% endfor %}"


@pytest.fixture
def loader(build_tokenizer, documents):
    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1].replace("w", " w")}]
        for text in documents[:8]
    ]
    source = MixedDocuments(
        [wrap_documents(documents[8:16], name="texts"), wrap_documents(chats, name="chats")], [1, 1]
    )
    return TokenSequenceLoader(
        source, build_tokenizer(chat_template=TEMPLATE), sequence_length=8, epochs=1, batch_size=2
    )


@pytest.fixture
def write(loader, model_pair, tmp_path):
    def make(name="store", models=model_pair, **options):
        harvester = ActivationHarvester(models, ["blocks.1.hook_resid_post"])
        return harvest_to_store(loader, harvester, tmp_path / name, **({"shard_bytes": 4096} | options))

    return make


def test_each_row_of_a_store_is_labelled(loader, write):
    store = write()
    labels = store.labels()
    expected = [batch.labels[batch.mask_HS] for batch in loader]
    for name in ("role_T", "source_T", "document_T"):
        assert torch.equal(getattr(labels, name), torch.cat([getattr(one, name) for one in expected]))
    assert len(store.shards) > 2
    assert len(labels.role_T.unique()) > 2
    assert [one["name"] for one in store.manifest["sources"]] == ["texts", "chats"]
    store.verify()


def test_a_store_that_was_stopped_goes_on_with_its_labels(write):
    whole = write("whole").labels()
    write("stopped", max_rows=20)
    again = write("stopped").labels()
    assert torch.equal(again.packed_R3(), whole.packed_R3())


def test_joined_stores_have_the_labels_of_each(write, model_pair):
    one, two = write("one", model_pair[:1]), write("two", model_pair[1:])
    joined = JoinedStores([one.path, two.path])
    assert torch.equal(joined.labels().packed_R3(), two.labels().packed_R3())


@pytest.mark.parametrize("at", [-1, -12])
def test_damaged_labels_are_refused(write, at):
    store = write()
    path = store.shards[1].path
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))
    for read in (store.labels, store.verify):
        with pytest.raises(InputError, match=r"the labels of shard .*000001.* do not match their checksum"):
            read()


def test_an_earlier_store_is_read_and_gone_on_with_as_it_is(write, tmp_path):
    rows = write("new")
    (tmp_path / "old").mkdir()
    manifest = {name: value for name, value in read_manifest(rows.path).items() if name != "sources"} | {"version": 1}
    write_manifest(tmp_path / "old", manifest)
    write("old", max_rows=20)
    store = write("old")
    assert store.labels() is None
    assert json.loads((tmp_path / "old" / "manifest.json").read_text())["version"] == 1
    assert all(shard.labels is None for shard in store.shards)
    index = torch.arange(len(store))
    assert torch.equal(ActivationCache(store.path).read_rows(index), rows.read_rows(index))
