import json

from crosscode.runs.state import read_state, write_state


def test_numbers_that_are_not_finite_come_back_from_strict_json(tmp_path):
    write_state(tmp_path, {"a": float("inf"), "b": [-float("inf"), 1.5, {"c": float("nan")}]})
    json.loads((tmp_path / "trainer_state.json").read_text(), parse_constant=lambda name: 1 / 0)
    state = read_state(tmp_path)
    assert state["a"] == float("inf") and state["b"][:2] == [-float("inf"), 1.5]
    assert state["b"][2]["c"] != state["b"][2]["c"]
