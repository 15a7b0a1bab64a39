"""Reading the files of a run that ended in any way."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosscode.analysis.metrics_file import read_metrics
from crosscode.analysis.run_record import read_run
from crosscode.errors import InputError

ROWS = [{"step": s, "tokens": 10 * s, "loss": 1.0 / s, "l0": None} for s in range(1, 6)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS)


@settings(max_examples=80, deadline=None)
@given(cut=st.integers(0, len(TEXT)))
def test_a_file_cut_anywhere_yields_all_whole_rows(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    path.write_text(TEXT[:cut])
    whole = TEXT[:cut].count("\n")
    found = read_metrics(path)
    last_is_whole = TEXT[cut : cut + 1] == "\n"
    assert found.rows == ROWS[: whole + last_is_whole]
    assert found.n_unreadable == int(cut > 0 and TEXT[cut - 1] != "\n" and not last_is_whole)


def test_other_damage_is_counted_and_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2}\n\xff\xfe\n[1]\n\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": 4}\n')
    found = read_metrics(path)
    assert found.n_unreadable == 2
    assert found.series("loss") == ([1, 3], [2, 4])


def test_a_step_logged_twice_counts_with_its_last_value(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "loss": 5}, {"step": 2, "loss": 4}, {"step": 2, "loss": 3}, {"step": 2, "eval/fvu": 1}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    found = read_metrics(path)
    assert found.series("loss") == ([1, 2], [5, 3])
    assert found.last("loss") == 3 and found.last("eval/fvu") == 1 and found.last("nothing") is None
    assert found.keys() == ["step", "loss", "eval/fvu"]
    assert all(math.isfinite(v) for v in found.series("loss")[1])


def test_a_missing_file_has_no_rows(tmp_path):
    assert read_metrics(tmp_path / "none").rows == []


@pytest.mark.parametrize("name", ["summary.json", "evaluation.json", "final/config.json"])
@pytest.mark.parametrize("content", ["{", "[1, 2]", "\udcff", '{"fvu": "0.1"}', '{"fvu_by_position": 3}', "[" * 10**5])
def test_a_damaged_file_is_left_out_and_named(name, content, make_run):
    run = make_run()
    (run / name).write_text(content, errors="surrogateescape")
    (problem,) = read_run(run).problems
    assert problem.startswith(str(run / name)) and "\n" not in problem


def test_figures_come_from_the_evaluation_then_the_summary_then_the_metrics(make_run):
    run = make_run()
    assert read_run(run).figure("fvu") == 0.21
    (run / "evaluation.json").unlink()
    (run / "summary.json").write_text(json.dumps(json.loads((run / "summary.json").read_text()) | {"fvu": 0.3}))
    assert read_run(run).figure("fvu") == 0.3
    (run / "summary.json").unlink()
    assert read_run(run).figure("fvu") == 0.21
    assert read_run(run).figure("loss") == pytest.approx(read_run(run).metrics.rows[-2]["loss"])
    assert read_run(run).fvu_by_position() == (dict.fromkeys(read_run(run).fvu_by_position()[0], 0.21), True)


@pytest.mark.parametrize("name", ["nothing-here", "empty"])
def test_what_is_no_run_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=f"run: .*{name}"):
        read_run(tmp_path / name)
