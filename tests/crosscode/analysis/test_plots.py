"""Plots are well-formed, follow the page's colours, and survive any numbers."""

import re
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosscode.analysis import plots
from crosscode.analysis.verdict import TAGS, Tag

NAMES = dict(zip(TAGS, ("a", "b", "shared", "undecided", "none"), strict=True))
XLINK = ' xmlns:xlink="http://www.w3.org/1999/xlink"'


def parsed(svg):
    """The tree; an inline SVG needs no namespace declarations in HTML, but in XML."""
    return ET.fromstring(svg.replace("<svg ", f"<svg{XLINK} ", 1))


def texts(svg):
    return [element.text for element in parsed(svg).iter("text")]


def some_plots(label="x"):
    rng = np.random.default_rng(0)
    relative = rng.uniform(size=300)
    tags: list[Tag] = [TAGS[int(4 * r)] for r in relative]
    shared: list[Tag] = ["shared"] * 3000
    line = (list(range(1, 2000)), list(1 / np.arange(1, 2000)))
    return {
        "curves": plots.curves({"one": line, "two": line}, xlabel="step", ylabel="FVU", label=label, log_y=True),
        "density": plots.density_histogram(10 ** rng.uniform(-4, 0, 300), n_tokens=10_000, label=label),
        "relative": plots.tagged_histogram(
            relative, tags, tag_names=NAMES, limits=(0, 1), xlabel="x", label=label, ends=("← a", "b →")
        ),
        "cosine": plots.tagged_histogram(relative, tags, tag_names=NAMES, limits=(-1, 1), xlabel="x", label=label),
        "scatter": plots.scaling_scatter(relative, rng.normal(size=300), tags, tag_names=NAMES, label=label),
        "many": plots.scaling_scatter(
            rng.normal(size=3000), rng.normal(size=3000), shared, tag_names=NAMES, label=label
        ),
        "bars": plots.bars(["one", "two"], [0.1, 0.2], ylabel="norm", label=label),
    }


@pytest.fixture(scope="module")
def drawn():
    return some_plots()


@pytest.mark.parametrize("kind", ["curves", "density", "relative", "cosine", "scatter", "many", "bars"])
def test_a_plot_is_one_element_without_links_whose_colours_are_the_pages(drawn, kind):
    svg = drawn[kind]
    tree = parsed(svg)
    assert tree.tag == "svg" and tree.attrib["role"] == "img" and tree.attrib["aria-label"] == "x"
    assert "http" not in svg and "<metadata" not in svg
    stripped = re.sub(r"var\(--[\w-]+, #[0-9a-f]{6}\)", "", svg)
    assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", stripped)) <= {"#ffffff"}
    references = {element.attrib[key] for element in tree.iter() for key in element.attrib if key.endswith("href")}
    ids = {element.attrib["id"] for element in tree.iter() if "id" in element.attrib}
    assert all(ref.startswith("data:") or ref.removeprefix("#") in ids for ref in references)
    assert all(name in ids for name in re.findall(r"url\(#([^)]+)\)", svg))


def test_ids_of_different_plots_differ():
    line = ([1.0, 2.0], [1.0, 2.0])
    svgs = [plots.curves({"a": line, "b": line}, xlabel="x", ylabel="y", label=label) for label in ("one", "two")]
    first, second = ({e.attrib["id"] for e in parsed(svg).iter() if "id" in e.attrib} for svg in svgs)
    assert first and not first & second


def test_plots_are_reproducible_and_leave_no_global_state(drawn):
    before = dict(matplotlib.rcParams)
    assert some_plots() == drawn
    assert dict(matplotlib.rcParams) == before


def test_names_of_the_user_are_text_and_nothing_else():
    evil = '<script>alert("1")</script> $x_1$ & \\1'
    line = ([1.0, 2.0], [1.0, 2.0])
    svg = plots.curves({evil: line, "b": line}, xlabel="x", ylabel="y", label=evil)
    assert "<script" not in svg and evil in texts(svg) and parsed(svg).attrib["aria-label"] == evil
    svg = plots.bars([evil], [1.0], ylabel="n", label="bars")
    assert evil in texts(svg)


def test_many_points_are_thinned_but_the_last_stays():
    x = list(range(100_000))
    svg = plots.curves({"a": (x, [float(v) for v in x])}, xlabel="x", ylabel="y", label="long")
    assert len(svg) < 40_000


def test_silent_latents_have_a_bar_with_their_number():
    svg = plots.density_histogram([0.0] * 1234 + [0.1] * 10, n_tokens=1000, label="d")
    assert "1,234 silent" in texts(svg)
    assert not any("silent" in (text or "") for text in texts(plots.density_histogram([0.1], n_tokens=10, label="d")))


numbers = st.floats(allow_nan=True, allow_infinity=True, width=32)


@settings(max_examples=8, deadline=None)
@given(st.lists(numbers, max_size=6), st.booleans())
def test_any_numbers_can_be_plotted(values, log_y):
    tags: list[Tag] = [TAGS[i % len(TAGS)] for i in range(len(values))]
    finite = [v for v in values if np.isfinite(v)]
    line = ([float(i) for i in range(len(finite))], finite)
    for svg in (
        plots.curves({"a": line}, xlabel="x", ylabel="y", label="l", log_y=log_y, marks={"a": line}),
        plots.tagged_histogram(values, tags, tag_names=NAMES, limits=(0, 1), xlabel="x", label="l"),
        plots.scaling_scatter(values, values, tags, tag_names=NAMES, label="l"),
        plots.density_histogram([min(abs(v), 1.0) for v in finite], n_tokens=100, label="l"),
    ):
        assert parsed(svg).tag == "svg"


def test_large_numbers_are_short():
    values = (12_345_678, 999, 1500, 2e9, 0.5)
    assert [plots.si_number(value) for value in values] == ["12.3M", "999", "1.5k", "2G", "0.5"]
