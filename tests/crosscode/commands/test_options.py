"""Words of the command line, and what they become."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from crosscode.commands.parts.options import merged, read_words
from crosscode.config.registry import Component, ConfigModel
from crosscode.errors import InputError


class Own(ConfigModel):
    n_tokens: int | None = Field(default=None, title="N")
    grid: list[str] = Field(default=[])


class Inner(ConfigModel):
    batch_size: int = 1
    fast: bool = False
    fused: bool | Literal["auto"] = False
    names: list[str] = Field(default=[])
    rates: tuple[float, float] = (0.0, 0.0)
    clip: float | None = 1.0


class One(ConfigModel):
    type: Literal["one"] = "one"
    k: int = 1


class Two(ConfigModel):
    type: Literal["two"] = "two"
    wide: bool = False


class Config(ConfigModel):
    run_dir: str = ""
    overwrite: bool = False
    inner: Inner = Inner()
    part: Annotated[One | Two, Field(discriminator="type")] | None = None
    component: Component = Component(type="x")
    parts: list[One] = Field(default=[])
    terms: dict[str, dict[str, object]] = Field(default={})


def values(*words):
    return read_words(words, Own, Config).values


@pytest.mark.parametrize("name", ["--run_dir", "--run-dir"])
def test_dashes_and_underscores_are_alike(name):
    assert values(name, "a-b_c") == values(f"{name}=a-b_c") == {"run_dir": "a-b_c"}
    assert values("--inner.batch-size", "3") == values("--inner.batch_size", "3") == {"inner": {"batch_size": "3"}}


@pytest.mark.parametrize(
    ("words", "positional", "expected"),
    [
        (["--overwrite"], [], {"overwrite": True}),
        (["--overwrite", "demo"], ["demo"], {"overwrite": True}),
        (["--inner.fused", "auto"], [], {"inner": {"fused": "auto"}}),
        (["--inner.fused", "demo"], ["demo"], {"inner": {"fused": True}}),
        (["demo", "--overwrite", "--inner.fast"], ["demo"], {"overwrite": True, "inner": {"fast": True}}),
        (["--overwrite", "false", "demo"], ["demo"], {"overwrite": "false"}),
        (["--overwrite=no", "demo"], ["demo"], {"overwrite": "no"}),
        (["--part.wide", "demo"], ["demo"], {"part": {"wide": True}}),
        (["--inner.batch_size", "1M", "demo"], ["demo"], {"inner": {"batch_size": "1M"}}),
        (["--component.flag"], [], {"component": {"flag": True}}),
        (["--terms.auxk", "demo"], ["demo"], {"terms": {"auxk": {}}}),
        (["--terms.auxk.weight", "-2"], [], {"terms": {"auxk": {"weight": "-2"}}}),
    ],
)
def test_flags_need_no_value_and_may_stand_before_the_config(words, positional, expected):
    read = read_words(words, Own, Config)
    assert read.positional == positional and read.values == expected


def test_lists_sections_and_null():
    assert values("--inner.names", "a,b", "--inner.names", "c") == {"inner": {"names": ["a", "b", "c"]}}
    assert values("--inner.names", "[a, 'b,c']") == {"inner": {"names": ["a", "b,c"]}}
    assert values("--inner.rates", "0.9,0.99") == {"inner": {"rates": ["0.9", "0.99"]}}
    assert values("--part", "{type: one, k: 2}", "--part.k", "3") == {"part": {"type": "one", "k": "3"}}
    assert values("--inner.clip", "null") == {"inner": {"clip": None}} and values("--part", "null") == {"part": None}
    assert values("--run_dir", "null") == {"run_dir": "null"}
    assert values("--grid", "a=1,2", "--grid", "b=3") == {"grid": ["a=1,2", "b=3"]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--inner.batchsize", "3"], r"unknown option --inner\.batchsize; did you mean --inner\.batch_size\?"),
        (["--batch_size=3"], r"unknown option --batch_size; did you mean --inner\.batch_size\?"),
        (["--inner.batch_size.x", "3"], r"unknown option --inner\.batch_size\.x"),
        (["--zzzzzz"], r"unknown option --zzzzzz$"),
        (["-x"], r"unknown option -x"),
        (["--run_dir"], r"--run_dir: expects a value"),
        (["--run_dir", "--overwrite"], r"--run_dir: expects a value"),
        (["--n-tokens"], r"--n-tokens: expects N"),
        (["--part", "{k: 1, k: 2}"], r"--part, line 1: 'k' is given twice"),
    ],
)
def test_bad_words_are_one_line(words, message):
    with pytest.raises(InputError, match=message) as caught:
        values(*words)
    assert "\n" not in str(caught.value)


def test_overrides_replace_single_fields_but_not_across_types():
    assert merged({"a": {"type": "x", "b": 1}}, {"a": {"b": 2}}) == {"a": {"type": "x", "b": 2}}
    assert merged({"a": {"type": "x", "b": 1}}, {"a": {"type": "y"}}) == {"a": {"type": "y"}}


def test_one_of_a_list_is_named_by_its_number():
    assert values("--parts.1.k", "3") == {"parts": {"1": {"k": "3"}}}
    given = {"parts": [{"k": 1}, {"k": 2, "wide": True}], "models": ["a", {"path": "b"}], "rates": [1, 2]}
    overrides = {"parts": {"1": {"k": 3}}, "models": {"0": {"dtype": "x"}}, "rates": {"0": 5}}
    assert merged(given, overrides) == {
        "parts": [{"k": 1}, {"k": 3, "wide": True}],
        "models": [{"path": "a", "dtype": "x"}, {"path": "b"}],
        "rates": [5, 2],
    }
    with pytest.raises(InputError, match=r"^parts.2: there are 2, counted from 0$"):
        merged(given, {"parts": {"2": {"k": 3}}})
    with pytest.raises(InputError, match=r"unknown option --inner.1"):
        values("--inner.1", "3")
