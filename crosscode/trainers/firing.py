"""Which latents fire.

Axes: B tokens · L latents.
"""

from __future__ import annotations

import torch
from crosscode_kernels.sparse import Latents
from torch import Tensor, nn


class FiringTracker(nn.Module):
    """Counts, for each latent, the tokens since it was last active, and on how many of the recent ones it was. `n_latents`
    is L.

    Lives on the model's device; nothing of it is read in a step.
    """

    tokens_since_fired_L: Tensor
    n_recent_L: Tensor
    n_recent_tokens: Tensor
    """a scalar"""
    l0: Tensor
    """of the last batch, a scalar"""

    def __init__(self, n_latents: int):
        super().__init__()
        self.register_buffer("tokens_since_fired_L", torch.zeros(n_latents, dtype=torch.int64))
        self.register_buffer("n_recent_L", torch.zeros(n_latents, dtype=torch.int64))
        self.register_buffer("n_recent_tokens", torch.zeros((), dtype=torch.int64))
        self.register_buffer("l0", torch.zeros(()), persistent=False)
        self._longest: int | None = None
        self.register_load_state_dict_post_hook(lambda *_: self.look())

    def update(self, latents: Latents) -> None:
        """Take note of a batch. A stored zero is not active."""
        self.update_counts(latents.firing_counts_L(), latents.batch_size)

    @torch.no_grad()
    def update_counts(self, counts_L: Tensor, n_tokens: int) -> None:
        """Take note of a batch of which it is known on how many tokens each latent was active."""
        self.tokens_since_fired_L.add_(n_tokens).masked_fill_(counts_L > 0, 0)
        self.n_recent_L.add_(counts_L)
        self.n_recent_tokens.add_(n_tokens)
        self.l0.copy_(counts_L.sum() / n_tokens)

    def look(self) -> None:
        """Read the longest silence from the device, and wait for it."""
        self._longest = self.tokens_since_fired_L.amax(0, keepdim=True).tolist()[0]

    def longest_silence(self, n_tokens: int) -> int:
        """A bound on `tokens_since_fired_L` behind the next batch, of `n_tokens` tokens: on the CPU that of the last batch plus
        these; elsewhere that of the last `look`, plus all tokens that were announced here since."""
        if self._longest is None or self.tokens_since_fired_L.device.type == "cpu":
            self.look()
        assert self._longest is not None
        self._longest += n_tokens
        return self._longest

    def dead_fraction(self, dead_after_tokens: int) -> Tensor:
        """Share of latents that were not active in the last `dead_after_tokens` tokens, a scalar."""
        return (self.tokens_since_fired_L >= dead_after_tokens).float().mean()

    def take_density_L(self) -> Tensor:
        """Share of the tokens since the last call on which each latent was active (float64, on the CPU)."""
        density_L = self.n_recent_L.cpu().double() / self.n_recent_tokens.cpu().clamp(min=1)
        self.n_recent_L.zero_()
        self.n_recent_tokens.zero_()
        return density_L
