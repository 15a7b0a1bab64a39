"""YAML that is refused, and counts as people write them."""

import time

import pytest
import yaml
from pydantic import PositiveInt

from crosscode.config.checked import checked
from crosscode.config.counts import as_count
from crosscode.config.experiment import TrainConfig
from crosscode.config.reading import MAX_DEPTH, dump_yaml, load_yaml, read_yaml
from crosscode.config.registry import ConfigModel
from crosscode.errors import InputError

BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", "file, line 5: 'c' is given twice (first in line 3)"),
        ("a: 1\na: 1\n", "file, line 2: 'a' is given twice"),
        (BOMB, "file, line 1: more than 100,000 values"),
        ("&a [*a]", "more than 100,000 values"),
        ("[" * 5000, f"nested more than {MAX_DEPTH} deep"),
        ("- " * 5000 + "1", f"nested more than {MAX_DEPTH} deep"),
        ("a: [1", "file, line 1:"),
        ("a: " + "9" * 5000, "file: is not valid YAML"),
        ("a: !!python/object:os.system x", "file, line 1: could not determine a constructor"),
        ("\x00", "file: is not valid YAML"),
    ],
)
def test_bad_yaml_is_refused_in_one_line_at_once(text, message):
    started = time.process_time()
    with pytest.raises(InputError) as caught:
        load_yaml(text, "file")
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert time.process_time() - started < 10


def test_aliases_and_merged_mappings_are_read():
    assert load_yaml("a: &x {b: 1, c: 2}\nd: {<<: *x, b: 3}\ne: *x", "file") == {
        "a": {"b": 1, "c": 2},
        "d": {"b": 3, "c": 2},
        "e": {"b": 1, "c": 2},
    }


def test_a_file_that_is_no_text_and_one_that_is_no_mapping_are_named(tmp_path):
    binary, listed = tmp_path / "binary.yaml", tmp_path / "list.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    listed.write_text("- 1\n")
    with pytest.raises(InputError, match=r"binary\.yaml.* no UTF-8 text"):
        read_yaml(binary)
    with pytest.raises(InputError, match=r"list\.yaml.* must hold a mapping of fields, got list"):
        read_yaml(listed)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1e6", 1_000_000), ("100_000", 100_000), ("1M", 1_000_000), ("1k", 1000), ("64K", 64_000), ("2.5M", 2_500_000),
        ("1B", 10**9), ("1.5e3", 1500), ("1.5", "1.5"), ("1.2345k", "1.2345k"), ("many", "many"), ("1m", "1m"),
        ("-1k", "-1k"), ("", ""),
    ],
)  # fmt: skip
def test_counts(text, count):
    assert as_count(text) == count


def test_only_integers_are_read_as_counts():
    class Fields(ConfigModel):
        n: PositiveInt | None = None
        name: str = ""
        lr: float = 0.0

    assert Fields.model_validate({"n": "1M", "name": "1M", "lr": "1e-3"}) == Fields(n=1_000_000, name="1M", lr=1e-3)
    with pytest.raises(ValueError, match="valid integer"):
        Fields.model_validate({"n": "1.5"})


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1:30", "1:30"), ("on", "on"), ("no", "no"), ("010", "010"), ("1_000", "1_000"), ("2020-01-01", "2020-01-01"),
        ("0b1", "0b1"), ("=", "="), ("TRUE", True), ("~", None), ("-7", -7), ("0x1F", 31), (".5", 0.5), ("1.0e-05", 1e-5),
        ("-.inf", float("-inf")),
    ],
)  # fmt: skip
def test_only_what_every_reader_takes_for_a_number_or_a_truth_is_one(written, value):
    found = load_yaml(f"a: {written}", "x")["a"]
    assert found == value and type(found) is type(value)


def test_what_is_written_is_read_as_it_was_here_and_by_other_readers():
    values = ["on", "1:30", "010", "0x1f", "1.5e3", "1e3", "", "~", "null", "<<", "=", ".inf", "2020-01-01", "a: b", "1_0",
              "é", 1e-5, 1e300, -0.5, 12, True, None]  # fmt: skip
    text = dump_yaml(values)
    for read in (load_yaml(text, "x"), yaml.safe_load(text)):
        assert read == values and [*map(type, read)] == [*map(type, values)]


def test_fields_read_text_as_people_do():
    def train(**fields):
        return checked(TrainConfig, load_yaml("\n".join(f"{name}: {text}" for name, text in fields.items()), "x"))

    found = train(n_tokens="1_000", batch_size="010", tensorboard="on", tf32="no")
    assert (found.n_tokens, found.batch_size, found.tensorboard, found.tf32) == (1000, 10, True, False)
    with pytest.raises(InputError, match="batch_size = '1:30'"):
        train(n_tokens="1", batch_size="1:30")
