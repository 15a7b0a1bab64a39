"""`crosscode report SWEEP`: a page without script that compares runs."""

import json
import math
import re

import pytest
import yaml

from crosscode.analysis.sweep_page import SweepRun, page_content, write_sweep_page
from crosscode.commands.cli import main


def test_a_sweep_has_a_page_of_its_runs(tmp_path, capsys, tiny_config):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_config), encoding="utf-8")
    folder = tmp_path / "grid"
    arguments = ["--grid", "crosscoder.activation.k=2,4", "--run-dir", str(folder)]
    assert main(["sweep", str(config), *arguments]) == 0
    assert main(["report", str(folder / "k=2")]) == 0
    capsys.readouterr()
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    page = (folder / "report.html").read_text()
    assert 'href="k%3D2/report.html"' in page and 'href="k%3D4' not in page and "2 of 2 runs done" in page
    for run in ("k=2", "k=4"):
        evaluation = json.loads((folder / run / "evaluation.json").read_text())
        assert f"<td>{evaluation['fvu']:.4f}</td><td>{evaluation['l0']:.2f}</td>" in page
        assert f"{run}: FVU {evaluation['fvu']:.4g}, L0 {evaluation['l0']:.4g}" in page
    assert main(["report", str(folder), "--csv", str(tmp_path / "t.csv")]) == 2
    assert "csv: is for one run" in capsys.readouterr().err


def test_names_are_text_and_nothing_runs(tmp_path):
    hostile = '<script>alert(1)</script>" onload="x'
    runs = [
        SweepRun(hostile, hostile, fvu=0.2, l0=30.0),
        SweepRun("b", "unfinished"),
        SweepRun("c", "done", fvu=0.0, l0=0.0),
    ]
    page = write_sweep_page(tmp_path / "report.html", hostile, hostile, runs).read_text()
    assert "<script" not in page and 'onload="' not in page and "default-src 'none'" in page
    assert page.count("<circle") == 1 and page.count("<tr>") == 4


@pytest.mark.parametrize("values", [(0.1, 0.9), (0.301, 0.302), (1e-4, 3.0)])
def test_places_are_logarithmic(values):
    found = page_content(
        "a", "", [SweepRun(str(v), "done", fvu=v, l0=10 * v) for v in (*values, math.sqrt(values[0] * values[1]))]
    )
    low, high, middle = (point["y"] for point in found["points"])
    assert high < middle < low and middle == pytest.approx((low + high) / 2, abs=0.2)
    assert len(found["ticks_y"]) >= 2 and all(20 <= y <= 280 for y, _ in found["ticks_y"])
    assert all(float(text) > 0 and re.fullmatch(r"[\d.e+-]+", text) for _, text in found["ticks_x"])
