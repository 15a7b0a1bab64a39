"""Token sequences: what is packed, what is masked, where it continues."""

import inspect
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosscode.config.data import TokenPolicy
from crosscode.data import TokenSequenceLoader, load_documents, wrap_documents
from crosscode.data.text.tokenizers import tokenizer_rules
from crosscode.errors import InputError


def loader_of(docs, tokenizer, **changes):
    options = {"sequence_length": 8, "batch_size": 3, "epochs": 1, "shuffle": False}
    return TokenSequenceLoader(wrap_documents(docs), tokenizer, **{**options, **changes})


def drain(loader):
    return list(loader)


def test_packing_puts_bos_first_and_eos_between_documents(tokenizer):
    batches = drain(loader_of(["w0 w1 w2", "w3 w4 w5 w6"], tokenizer, sequence_length=6))
    assert len(batches) == 1
    assert batches[0].tokens_HS.tolist() == [[1, 6, 7, 8, 2, 9], [1, 10, 11, 12, 2, 3]]
    assert batches[0].mask_HS.tolist() == [[False] + [True] * 5, [False] + [True] * 4 + [False]]


def test_bos_policies(tokenizer):
    by_document = drain(loader_of(["w0", "w1"], tokenizer, bos="document", sequence_length=6))[0]
    assert by_document.tokens_HS.tolist() == [[1, 6, 2, 1, 7, 2]]
    without = drain(loader_of(["w0", "w1"], tokenizer, bos="none", separator="none", sequence_length=2))[0]
    assert without.tokens_HS.tolist() == [[6, 7]]
    assert without.mask_HS.tolist() == [[False, True]]


def test_every_token_arrives_once_and_in_order(tokenizer, documents):
    expected = [token for ids in tokenizer(documents, add_special_tokens=False)["input_ids"] for token in [*ids, 2]]
    seen = [
        token
        for batch in loader_of(documents, tokenizer)
        for row, usable in zip(batch.tokens_HS.tolist(), batch.mask_HS.tolist(), strict=True)
        for token, is_usable in zip(row, usable, strict=True)
        if is_usable
    ]
    assert seen == expected


@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=12), S=st.integers(2, 9), H=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_no_usable_token_is_lost_or_repeated(lengths, S, H):
    documents = [[10 + i] * n for i, n in enumerate(lengths)]
    loader = TokenSequenceLoader(
        wrap_documents(documents), None, sequence_length=S, batch_size=H, epochs=1, shuffle=False,
        bos="none", separator="none", keep_first_position=True,
    )  # fmt: skip
    if not sum(lengths):
        with pytest.raises(InputError, match="no usable position"):
            drain(loader)
        return
    batches = drain(loader)
    seen = torch.cat([batch.tokens_HS[batch.mask_HS] for batch in batches]).tolist()
    assert seen == [token for document in documents for token in document]
    assert all(batch.tokens_HS.shape[1] == S and 1 <= batch.tokens_HS.shape[0] <= H for batch in batches)


def test_the_first_position_is_masked_unless_kept(tokenizer, documents):
    assert not any(batch.mask_HS[:, 0].any() for batch in loader_of(documents, tokenizer))
    assert all(batch.mask_HS[:, 0].all() for batch in loader_of(documents, tokenizer, keep_first_position=True))


def test_special_and_chosen_tokens_are_masked(tokenizer, documents):
    for batch in loader_of(documents, tokenizer, mask_special_tokens=True, mask_token_ids=[6, 7]):
        assert not torch.isin(batch.tokens_HS[batch.mask_HS], torch.tensor([0, 1, 2, 3, 6, 7])).any()
    kept = torch.cat([batch.tokens_HS[batch.mask_HS] for batch in loader_of(documents, tokenizer)])
    assert torch.isin(torch.tensor([2, 6, 7]), kept).all()


def test_unpacked_documents_have_sequences_of_their_own(tokenizer):
    batch = drain(loader_of(["w0 w1", "w2 w3 w4 w5 w6"], tokenizer, pack=False, sequence_length=4))[0]
    assert batch.tokens_HS.tolist() == [[1, 6, 7, 3], [1, 8, 9, 10], [1, 11, 12, 3]]


def test_isolation_numbers_documents_and_masks_their_first_positions(tokenizer):
    batch = drain(loader_of(["w0 w1", "w2 w3"], tokenizer, isolate_documents=True, bos="document", sequence_length=8))[
        0
    ]
    assert batch.tokens_HS.tolist() == [[1, 6, 7, 2, 1, 8, 9, 2]]
    assert batch.segments_HS.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
    assert batch.mask_HS.tolist() == [[False, True, True, True, False, True, True, True]]


def test_epochs_follow_each_other_with_their_own_order(tokenizer, documents):
    once = drain(loader_of(documents, tokenizer, shuffle=True, seed=5))
    thrice = drain(loader_of(documents, tokenizer, shuffle=True, seed=5, epochs=3))
    by_epoch = [[b.tokens_HS for b in thrice if b.epoch == epoch] for epoch in range(3)]
    assert all(torch.equal(a.tokens_HS, b) for a, b in zip(once, by_epoch[0], strict=True))
    flat = [torch.cat(batches) for batches in by_epoch]
    assert not torch.equal(flat[0], flat[1])
    counts = [tokens_NS.flatten().bincount(minlength=46)[6:] for tokens_NS in flat]
    assert torch.equal(counts[0], counts[1])


def test_endless_source_never_ends(tokenizer):
    iterator = iter(loader_of(["w0 w1 w2"], tokenizer, epochs=None))
    assert [next(iterator).epoch for _ in range(20)] == list(range(20))


def test_it_can_be_iterated_again(tokenizer, documents):
    loader = loader_of(documents, tokenizer)
    first, second = drain(loader), drain(loader)
    assert all(torch.equal(a.tokens_HS, b.tokens_HS) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 4, 9, 30])
def test_state_continues_exactly(tokenizer, documents, stop, streaming):
    import datasets

    data = datasets.Dataset.from_dict({"text": documents})
    source = wrap_documents(data.to_iterable_dataset(num_shards=3) if streaming else data, column="text")

    def make():
        return TokenSequenceLoader(source, tokenizer, sequence_length=8, batch_size=3, seed=3)

    iterator = iter(make())
    expected = [next(iterator) for _ in range(60)]
    interrupted = make()
    iterator = iter(interrupted)
    for _ in range(stop):
        next(iterator)
    state = interrupted.state_dict()
    assert all(isinstance(value, torch.Tensor | int | str) for value in state.values())
    resumed = make()
    resumed.load_state_dict(state)
    iterator = iter(resumed)
    for want in expected[stop:]:
        got = next(iterator)
        assert torch.equal(got.tokens_HS, want.tokens_HS)
        assert torch.equal(got.mask_HS, want.mask_HS)
        assert got.epoch == want.epoch


def test_state_of_other_settings_is_refused(tokenizer, documents):
    state = loader_of(documents, tokenizer).state_dict()
    with pytest.raises(InputError, match="sequence_length was 8 when it was saved and is 9 now"):
        loader_of(documents, tokenizer, sequence_length=9).load_state_dict(state)


def test_validation_and_training_share_no_document(tokenizer, documents):
    repeated = [*documents, *documents[:10]]
    sides = {}
    for split in ("train", "validation", "all"):
        loader = loader_of(
            repeated, tokenizer, split=split, validation_fraction=0.3, pack=False, sequence_length=40, batch_size=1
        )
        sides[split] = [tuple(batch.tokens_HS[0].tolist()) for batch in loader]
    assert sides["train"] and sides["validation"]
    assert not set(sides["train"]) & set(sides["validation"])
    assert sorted(sides["train"] + sides["validation"]) == sorted(sides["all"])


def test_workers_share_the_documents(tokenizer, documents):
    options = {"pack": False, "sequence_length": 40, "batch_size": 1}
    parts = [
        [tuple(batch.tokens_HS[0].tolist()) for batch in loader_of(documents, tokenizer, worker=(i, 3), **options)]
        for i in range(3)
    ]
    whole = [tuple(batch.tokens_HS[0].tolist()) for batch in loader_of(documents, tokenizer, **options)]
    assert sorted(row for part in parts for row in part) == sorted(whole)


def test_pretokenised_documents(tokenizer):
    batch = drain(loader_of([[6, 7], [8, 9]], tokenizer, sequence_length=7))[0]
    assert batch.tokens_HS.tolist() == [[1, 6, 7, 2, 8, 9, 2]]


CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"


@pytest.mark.parametrize(("policy", "usable"), [("keep", [4, 6, 7, 2, 5, 8, 2]), ("mask", [6, 7, 8])])
def test_chats_go_through_the_template(policy, usable, build_tokenizer):
    tokenizer = build_tokenizer(chat_template=CHAT)
    chat = [{"role": "user", "content": "w0 w1"}, {"role": "assistant", "content": "w2"}]
    batch = drain(loader_of([chat], tokenizer, pack=False, template_tokens=policy))[0]
    assert batch.tokens_HS.tolist() == [[1, 4, 6, 7, 2, 5, 8, 2]]
    assert batch.tokens_HS[batch.mask_HS].tolist() == usable


def test_a_policy_and_keywords_say_the_same(tokenizer, documents):
    fields = {"sequence_length": 8, "batch_size": 3, "epochs": 1, "seed": 4, "bos": "document", "mask_token_ids": [6]}
    source, policy = wrap_documents(documents), TokenPolicy(**fields)
    by_policy, by_fields = (
        TokenSequenceLoader(source, tokenizer, policy),
        TokenSequenceLoader(source, tokenizer, **fields),
    )
    assert by_policy.describe() == by_fields.describe()
    assert TokenSequenceLoader(source, tokenizer, policy, seed=5).policy == by_fields.fresh(seed=5).policy
    assert policy.seed == 4
    with pytest.raises(
        InputError, match=r"seed = 'x': .*; sequence_lenght: unknown field .* did you mean 'sequence_length'"
    ):
        TokenSequenceLoader(source, tokenizer, policy, seed="x", sequence_lenght=8)


def test_help_shows_the_fields_of_the_policy():
    shown = inspect.signature(TokenSequenceLoader).parameters
    assert list(shown)[:5] == ["source", "tokenizer", "policy", "others", "shuffle"]
    assert (shown["sequence_length"].default, shown["batch_size"].default) == (inspect.Parameter.empty, 8)
    assert list(shown)[4:] == list(TokenPolicy.model_fields)


def test_stores_and_positions_record_the_fields_that_they_always_did(tokenizer):
    """Under these names and with these values, or what lies on disk is refused."""
    told = json.loads(loader_of(["w0"], tokenizer, worker=(1, 2), mask_special_tokens=True).describe())
    assert told.pop("dataset") and told.pop("tokenizer") == tokenizer_rules(tokenizer)
    assert told == {
        "sequence_length": 8, "batch_size": 3, "shuffle": False, "seed": 0, "bos": "sequence", "separator": "eos",
        "pack": True, "isolate_documents": False, "keep_first_position": False, "template_tokens": "keep",
        "split": "all", "validation_fraction": 0.0, "worker": [1, 2], "masked_ids": [0, 1, 2, 3], "bos_id": 1,
        "separator_id": 2, "pad_id": 3, "chat_template": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 1}, "sequence_length = 1: input should be greater than or equal to 2"),
        ({"batch_size": 0}, "batch_size = 0: input should be greater than 0"),
        ({"epochs": 0}, "epochs = 0: input should be greater than 0"),
        ({"bos": "always"}, "bos = 'always': input should be 'sequence', 'document' or 'none'"),
        ({"split": "validation"}, "validation_fraction = 0.0: must be above 0"),
        ({"worker": (2, 2)}, "worker"),
    ],
)
def test_bad_arguments_are_refused(changes, message, tokenizer, documents):
    with pytest.raises(InputError, match=message):
        loader_of(documents, tokenizer, **changes)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (["", " "], "its 2 documents hold no usable position"),
        ([[1.5, 2.5]], "a document is"),
        ([3, 4], r"a document is '3' \(int\)"),
        ([b"w0 w1"], r"\(bytes\)"),
        ([{"text": "w0"}], r"a row of fields \(text\); name the column"),
        ([[7, -100, 8]], "holds -100 where a token id is needed"),
        ([[7, 1 << 40]], "where a token id is needed"),
        (["w0 \ud800 w1"], "half a surrogate pair"),
        ([[{"role": "user", "content": "w0"}]], "no chat template"),
    ],
)
def test_bad_documents_are_refused(documents, message, tokenizer):
    with pytest.raises(InputError, match=message):
        drain(loader_of(documents, tokenizer))


def test_a_matrix_of_token_ids_is_a_dataset(tokenizer):
    ids = torch.tensor([[7, 8, 9], [10, 11, 12]])
    for data in (ids, ids.numpy()):
        assert drain(loader_of(data, tokenizer))[0].tokens_HS.tolist() == [
            [1, 7, 8, 9, 2, 10, 11, 12],
            [1, 2] + [3] * 6,
        ]


def test_an_empty_validation_split_says_so(tokenizer):
    loader = loader_of(["w0 w1"], tokenizer, split="validation", validation_fraction=1e-9)
    with pytest.raises(InputError, match="leave nothing in the validation split"):
        drain(loader)


def test_datasets_of_every_local_kind(tmp_path, tokenizer, documents):
    import datasets

    data = datasets.Dataset.from_dict({"text": documents})
    data.save_to_disk(str(tmp_path / "saved"))
    data.to_json(str(tmp_path / "data.jsonl"))
    data.to_parquet(str(tmp_path / "data.parquet"))
    (tmp_path / "texts").mkdir()
    for i, document in enumerate(documents):
        (tmp_path / "texts" / f"{i:03}.txt").write_text(document)
    expected = [batch.tokens_HS for batch in loader_of(documents, tokenizer)]
    for name in ("saved", "data.jsonl", "data.parquet", "texts"):
        for streaming in (False, True):
            source = load_documents(str(tmp_path / name), streaming=streaming)
            loader = TokenSequenceLoader(source, tokenizer, sequence_length=8, batch_size=3, epochs=1, shuffle=False)
            got = [batch.tokens_HS for batch in loader]
            assert len(got) == len(expected)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), (name, streaming)


def test_bad_datasets_are_refused(tmp_path):
    import datasets

    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "lines.jsonl").write_text(json.dumps({"body": "w0"}) + "\n")
    (tmp_path / "nothing").mkdir()
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["w0"]})}).save_to_disk(str(tmp_path / "splits"))
    cases = {
        "missing": "no such file or folder",
        "empty.jsonl": "is empty",
        "lines.jsonl": "'text' is not a column of dataset .* it has body",
        "nothing": "no file of a known kind",
        "splits": "split: 'train' is not in .* it has test",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=message) as error:
            load_documents(str(tmp_path / name))
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="'text' is not a column"):
        load_documents(str(tmp_path / "lines.jsonl"), streaming=True)
    with pytest.raises(InputError, match="is empty"):
        wrap_documents([])
    with pytest.raises(InputError, match="cannot be read more than once"):
        wrap_documents(iter(["w0"]))


def test_missing_values_are_empty_documents_not_the_end(tokenizer):
    import datasets

    data = datasets.Dataset.from_dict({"text": ["w0 w1", None, "w2"]})
    for source in (data, data.to_iterable_dataset()):
        loader = TokenSequenceLoader(
            wrap_documents(source, column="text"), tokenizer, sequence_length=6, epochs=1, shuffle=False
        )
        assert next(iter(loader)).tokens_HS.tolist() == [[1, 6, 7, 2, 8, 2]]


def test_compressed_files_and_what_lies_beside_them(tmp_path, tokenizer, documents):
    import gzip

    (tmp_path / "README.md").write_text("no data")
    with gzip.open(tmp_path / "data.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in documents)
    expected = [batch.tokens_HS for batch in loader_of(documents, tokenizer)]
    for path in (tmp_path, tmp_path / "data.jsonl.gz"):
        loader = TokenSequenceLoader(
            load_documents(str(path)), tokenizer, sequence_length=8, batch_size=3, epochs=1, shuffle=False
        )
        assert all(torch.equal(a.tokens_HS, b) for a, b in zip(loader, expected, strict=True))


def test_a_fingerprint_depends_on_the_content_not_on_the_place(tmp_path, documents):
    import datasets

    def save(name, texts):
        datasets.Dataset.from_dict({"text": texts}).to_json(str(tmp_path / f"{name}.jsonl"))
        return load_documents(str(tmp_path / f"{name}.jsonl")).fingerprint

    assert save("one", documents) == save("two", documents) == wrap_documents(documents).fingerprint
    changed = [*documents[:-1], documents[-1] + " w0"]
    assert save("three", changed) != save("one", documents)
    assert save("four", documents[:-1]) != save("one", documents)
