"""The demo's corpus: the same split everywhere, nothing shared between its halves."""

from pathlib import Path

import pytest

from crosscode.demo.corpus import (
    MIN_CHARACTERS_OF_A_REPEAT,
    as_dataset,
    demo_documents,
    document_split,
)
from crosscode.errors import InputError

PROSE = "{} is a sentence that is long enough to count as a paragraph of its own." + " And on it goes." * 20


@pytest.fixture(scope="module")
def by_split():
    return {split: demo_documents(split) for split in ("train", "heldout")}


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    """A standard library in miniature: 40 modules and what must not be read."""
    for index in range(40):
        (tmp_path / f"module_{index}.py").write_text(f"value = {index}\n" + "# text\n" * 40)
    text = "# text\n" * 40
    for name in ("test/test_a.py", "json/tests/test_b.py", "encodings/table.py", "site-packages/x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "tiny.py").write_text("pass\n")
    (tmp_path / "huge.py").write_text("#" * 200_000)
    (tmp_path / "broken.py").write_bytes(b"# coding: utf-8\n\xff\xfe" * 40)
    (tmp_path / "pydoc_data").mkdir()
    topics = {f"topic{index}": PROSE.format(index) for index in range(40)}
    topics["all"] = "\n\n".join(topics.values())
    (tmp_path / "pydoc_data" / "topics.py").write_text(f"topics = {topics!r}\n")
    return tmp_path


def test_no_document_is_in_both_splits(by_split):
    names = {split: {(doc.domain, doc.path) for doc in documents} for split, documents in by_split.items()}
    assert names["train"] and names["heldout"]
    assert not names["train"] & names["heldout"]


def test_no_paragraph_of_the_held_out_manual_is_in_training(by_split):
    def paragraphs(split: str) -> set[str]:
        texts = [doc.text for doc in by_split[split] if doc.domain == "manual"]
        normal = (" ".join(paragraph.split()) for text in texts for paragraph in text.split("\n\n"))
        return {paragraph for paragraph in normal if len(paragraph) >= MIN_CHARACTERS_OF_A_REPEAT}

    assert len(paragraphs("heldout")) > 20
    assert not paragraphs("train") & paragraphs("heldout")


def test_both_domains_have_a_tenth_or_so_held_out(by_split):
    for domain in ("code", "manual"):
        size = {split: sum(len(doc.text) for doc in docs if doc.domain == domain) for split, docs in by_split.items()}
        assert 0.05 < size["heldout"] / (size["train"] + size["heldout"]) < 0.25


def test_code_holds_neither_tests_nor_the_manual(by_split):
    for doc in by_split["train"] + by_split["heldout"]:
        if doc.domain == "code":
            assert not {"test", "tests", "encodings", "pydoc_data", "site-packages"} & set(doc.path.split("/")[:-1])


def test_the_split_is_that_of_the_released_models():
    # The embedded models were trained on this split: a change of the hash would put training text into evaluation.
    assert document_split("code", "json/decoder.py") == "train"
    assert document_split("code", "random.py") == "heldout"
    assert document_split("manual", "typesmapping") == "heldout"
    assert document_split("manual", "specialnames") == "train"


def test_the_split_does_not_hang_on_the_place_of_installation(stdlib: Path, tmp_path_factory):
    before = demo_documents("heldout", stdlib=stdlib)
    moved = stdlib.rename(tmp_path_factory.mktemp("elsewhere") / "lib")
    assert demo_documents("heldout", stdlib=moved) == before


def test_only_documents_of_use_are_read(stdlib: Path):
    paths = {doc.path for split in ("train", "heldout") for doc in demo_documents(split, ("code",), stdlib=stdlib)}
    assert paths == {f"module_{index}.py" for index in range(40)}
    with_tests = {doc.path for doc in demo_documents("train", ("code",), include_tests=True, stdlib=stdlib)}
    assert with_tests - paths <= {"test/test_a.py", "json/tests/test_b.py"}


def test_a_topic_that_repeats_others_keeps_only_what_is_new(stdlib: Path):
    documents = [doc for split in ("train", "heldout") for doc in demo_documents(split, ("manual",), stdlib=stdlib)]
    everything = "\n\n".join(doc.text for doc in documents)
    assert all(f"\n{everything}".count("\n" + PROSE.format(index)) == 1 for index in range(40))


def test_the_dataset_holds_the_documents():
    dataset = as_dataset(demo_documents("heldout", ("manual",)))
    documents = demo_documents("heldout", ("manual",))
    assert dataset.column_names == ["text", "domain", "path"]
    assert dataset["text"][:] == [doc.text for doc in documents]
    assert not dataset.cache_files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split: 'test' must be one of train, heldout"),
        ({"split": "train", "domains": ("prose",)}, r"domains: \('prose',\)"),
        ({"split": "train", "domains": "code"}, "domains: 'code' must be a non-empty sequence"),
        ({"split": "train", "domains": ()}, r"domains: \(\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        demo_documents(**arguments)


def test_an_installation_without_the_manual_is_named(stdlib: Path):
    (stdlib / "pydoc_data" / "topics.py").unlink()
    with pytest.raises(InputError, match=r"'manual' needs .*topics\.py"):
        demo_documents("train", stdlib=stdlib)
