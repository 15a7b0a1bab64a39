"""Two small language models that differ, and tokens for them."""

import copy

import pytest
import torch

from crosscode.data import ActivationHarvester, TokenBatch, load_language_model, wrap_language_model


def moved(path, generator):
    """A tiny model, moved so far that it is no longer near its initialisation."""
    torch.set_num_threads(1)
    model = load_language_model(path)
    for param in model.model.parameters():
        param.copy_(param + 0.3 * torch.randn(param.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def lm(tiny_lms):
    return moved(tiny_lms[0], torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def harvester(tiny_lms):
    """A, and B, which differs from A in the layers up to block 1 alone; read behind that block."""
    generator = torch.Generator().manual_seed(0)
    a = moved(tiny_lms[0], generator)
    changed = copy.deepcopy(a.model)
    for layer in changed.model.layers[:2]:
        for param in layer.parameters():
            param.copy_(param + 0.2 * torch.randn(param.shape, generator=generator))
    return ActivationHarvester([a, wrap_language_model(changed, a.tokenizer, "B")], ["blocks.1.hook_resid_post"])


@pytest.fixture
def batch():
    tokens_HS = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(2))
    return TokenBatch(tokens_HS, torch.ones_like(tokens_HS, dtype=torch.bool), None, 0)
