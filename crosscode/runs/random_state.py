"""The global random generators, so that a resumed run draws on where it stopped."""

from __future__ import annotations

from typing import Any

import torch


class RandomState:
    """PyTorch's global generators, of the CPU and of every CUDA device that is in use."""

    def state_dict(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return {"cpu": torch.get_rng_state(), "cuda": cuda}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["cpu"])
        if state["cuda"] and torch.cuda.device_count() >= len(state["cuda"]):
            torch.cuda.set_rng_state_all(state["cuda"])
