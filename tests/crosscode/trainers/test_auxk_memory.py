"""What a training step with AuxK keeps for backward while no latent is dead.

Axes: B tokens · M models · P hookpoints · D width · L latents.
"""

from __future__ import annotations

import pytest
import torch

from crosscode.config.experiment import TrainConfig
from crosscode.config.registry import Component
from crosscode.models import (
    AnthropicTransposeInit,
    AnthropicTransposeInitCrossLayerTC,
    CrossLayerTranscoder,
    ModelHookpointAcausalCrosscoder,
    TopkActivation,
)
from crosscode.objectives import objective_from
from crosscode.trainers.firing import FiringTracker
from crosscode.trainers.forward import ForwardPass

B, M, D, L, K = 1024, 2, 768, 16384, 32
MIB = 2**20


@pytest.fixture(scope="module")
def model():
    crosscoder = ModelHookpointAcausalCrosscoder(M, 1, D, L, TopkActivation(K, n_latents=L), backend="torch")
    return crosscoder.init_weights(AnthropicTransposeInit(), seed=0).train()


def kept_bytes(model, objective, tracker):
    """Bytes of the unique storages that autograd keeps, parameters excluded; and the terms of the loss."""
    terms = objective_from({name: Component(type=name, **fields) for name, fields in objective.items()})
    forward = ForwardPass(model, terms, tracker, TrainConfig(n_tokens=B, batch_size=B))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    generator = torch.Generator().manual_seed(1)
    x_BXD, target_BXD = (
        torch.randn(B, *dims, model.d_in, generator=generator) for dims in (model.in_dims, model.out_dims)
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward.announce(B)
        _, values = forward(x_BXD, target_BXD)
    return sum(kept.values()), values


def test_auxk_keeps_nothing_while_nothing_is_dead(model):
    objective = {"recon": {}, "auxk": {"k_aux": D // 2}}
    with_auxk, terms = kept_bytes(model, objective, FiringTracker(L))
    without, _ = kept_bytes(model, {"recon": {}}, FiringTracker(L))
    assert without <= with_auxk <= 13 * MIB
    assert with_auxk - without < 1024
    assert terms["auxk"].item() == 0 and not terms["auxk"].requires_grad
    dead = FiringTracker(L)
    with torch.no_grad():
        model.b_enc_L[:100] = -0.3  # positive on some tokens, among the k largest on none
    dead.tokens_since_fired_L[:100] = 20_000_000
    some, terms = kept_bytes(model, objective, dead)
    assert some > with_auxk and terms["auxk"].item() > 0


def test_a_transcoder_neither():
    transcoder = CrossLayerTranscoder(6, 512, 512, 8192, TopkActivation(K, n_latents=8192), backend="torch")
    transcoder.init_weights(AnthropicTransposeInitCrossLayerTC(), seed=0).train()
    with_auxk, terms = kept_bytes(transcoder, {"recon": {}, "auxk": {"k_aux": 256}}, FiringTracker(8192))
    without, _ = kept_bytes(transcoder, {"recon": {}}, FiringTracker(8192))
    assert without <= with_auxk < without + 1024
    assert terms["auxk"].item() == 0 and not terms["auxk"].requires_grad
