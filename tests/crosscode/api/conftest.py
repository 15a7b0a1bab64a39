"""Activations with structure, in tiny sizes.

Axes: F features · N rows · D width.
"""

import pytest
import torch

import crosscode

WIDTH, N_ROWS = 8, 600
SAE = {"type": "sae", "n_latents": 24, "activation": {"type": "topk", "k": 3}}


@pytest.fixture(scope="session")
def acts():
    """`acts_ND` (float32)."""
    generator = torch.Generator().manual_seed(0)
    features_FD = torch.randn(20, WIDTH, generator=generator)
    active_NF = (torch.rand(N_ROWS, 20, generator=generator) < 0.1).float()
    return active_NF @ features_FD + 0.05 * torch.randn(N_ROWS, WIDTH, generator=generator)


@pytest.fixture
def train(tmp_path):
    """`crosscode.train` in few steps on the CPU, into `tmp_path / run`."""
    torch.set_num_threads(1)

    def run(acts, crosscoder=None, name="run", **arguments):
        small = {
            "n_tokens": 640,
            "batch_size": 64,
            "device": "cpu",
            "backend": "torch",
            "log_every": 2,
            "progress": False,
        }
        crosscoder = dict(SAE) if crosscoder is None else crosscoder
        return crosscode.train(acts, crosscoder, run_dir=tmp_path / name, **small | arguments)

    return run
