"""What a cell of a table reads is the document."""

import csv

import datasets
import pytest

from crosscode.data import load_documents


@pytest.mark.parametrize(
    "cells", [["NA", "null", "None", "nan", "N/A", "NULL", "", "w1, w2"], ["007", "1.50", "2", "True"]]
)
@pytest.mark.parametrize("streaming", [True, False])
def test_cells_of_a_csv_are_the_text_that_they_read(cells, streaming, tmp_path):
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((cell, "NA" if i else "3") for i, cell in enumerate(cells))])
    assert list(load_documents(str(tmp_path / "t.csv"), streaming=streaming).open()) == cells


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_words_for_nothing_are_documents_and_null_is_none(kind, tmp_path):
    rows = ["NA", None, "null", "w1", "nan"]
    file = tmp_path / f"t.{kind}"
    data = datasets.Dataset.from_dict({"text": rows})
    data.to_json(file) if kind == "jsonl" else data.to_parquet(file)
    assert list(load_documents(str(file)).open()) == [row or "" for row in rows]
