"""The stand-in for CUDA graphs (tests/helpers/graph_double.py) is as blind as they are, and as strict."""

from __future__ import annotations

import pytest
import torch
from graph_double import GraphDouble
from torch import Tensor, nn


class Step:
    """A training step of a small regression, with numbers of Python and one in memory."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.weight, self.x_BI = nn.Parameter(torch.randn(3, 4)), torch.zeros(5, 4)
        self.lr, self.factor = torch.tensor(0.1), 1.0
        self.optimizer = torch.optim.Adam([self.weight], self.lr, fused=True, capturable=True)

    def __call__(self) -> Tensor:
        loss = (self.x_BI @ self.weight.T - 1).square().mean() * self.factor
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def prepare(self, number: int) -> None:
        self.x_BI.copy_(torch.randn(5, 4, generator=torch.Generator().manual_seed(number)))
        self.lr.fill_(0.1 / (number + 1))


def eager(n_steps: int, factors: list[float]) -> tuple[Step, list[float]]:
    step, losses = Step(), []
    for number in range(n_steps):
        step.prepare(number)
        step.factor = factors[number]
        losses.append(step().item())
    return step, losses


def captured(n_steps: int, factors: list[float]) -> tuple[Step, list[float]]:
    step, double, losses = Step(), GraphDouble(), []
    for number in range(2):
        step.prepare(number)
        losses.append(double.aside(step).item())
    step.factor = factors[2]
    loss, replay = double.capture(step)
    for number in range(2, n_steps):
        step.prepare(number)
        step.factor = factors[number]
        replay()
        losses.append(loss.item())
    assert (double.n_captures, double.n_replays) == (1, n_steps - 2)
    return step, losses


def test_replays_are_steps_to_the_bit():
    (one, losses), (other, replayed) = eager(6, [1.0] * 6), captured(6, [1.0] * 6)
    assert losses == replayed and torch.equal(one.weight, other.weight)


def test_a_number_that_changed_in_python_is_not_seen():
    factors = [1.0, 1.0, 1.0, 2.0, 3.0]
    (_, losses), (_, replayed) = eager(5, factors), captured(5, factors)
    assert losses[:3] == replayed[:3] and losses[3] != replayed[3]


def test_a_tensor_that_lies_elsewhere_since_is_not_seen():
    step, double = Step(), GraphDouble()
    step.prepare(0)
    step()
    _, replay = double.capture(step)
    before = step.weight.detach().clone()
    step.weight.data, old = before.clone(), step.weight.data
    replay()
    assert torch.equal(step.weight, before) and not torch.equal(old, before)


def test_a_capture_runs_nothing_and_replays_change_no_version():
    step, double = Step(), GraphDouble()
    step.prepare(0)
    step()
    before = [one.detach().clone() for one in (step.weight, *step.optimizer.state[step.weight].values())]
    _, replay = double.capture(step)
    now = (step.weight, *step.optimizer.state[step.weight].values())
    assert all(torch.equal(one, other) for one, other in zip(now, before, strict=True))
    version = step.weight._version
    replay()
    assert not torch.equal(step.weight, before[0]) and step.weight._version == version


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool((x > 0).any())])
def test_waiting_for_a_value_is_refused_and_leaves_everything_as_it_was(read):
    weight = torch.randn(4)
    before = weight.clone()

    def step() -> None:
        weight.add_(1)
        read(weight)

    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        GraphDouble().capture(step)
    assert torch.equal(weight, before)
