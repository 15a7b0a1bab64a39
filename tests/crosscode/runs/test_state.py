import json

import torch

from crosscode.runs.state import read_state, write_state


def test_numbers_that_are_not_finite_come_back_from_strict_json(tmp_path):
    write_state(tmp_path, {"a": float("inf"), "b": [-float("inf"), 1.5, {"c": float("nan")}]})
    json.loads((tmp_path / "trainer_state.json").read_text(), parse_constant=lambda name: 1 / 0)
    state = read_state(tmp_path)
    assert state["a"] == float("inf") and state["b"][:2] == [-float("inf"), 1.5]
    assert state["b"][2]["c"] != state["b"][2]["c"]


def test_tensors_that_share_memory_come_back_apart(tmp_path):
    whole = torch.arange(6.0).reshape(2, 3).requires_grad_()
    state = {"whole": whole, "row": whole[1], "turned": whole.T, "alone": torch.tensor([7]), "again": [whole]}
    write_state(tmp_path, state)
    found = read_state(tmp_path)
    assert torch.equal(found["whole"], whole) and torch.equal(found["again"][0], whole)
    assert torch.equal(found["row"], whole[1]) and torch.equal(found["turned"], whole.T) and found["alone"] == 7
