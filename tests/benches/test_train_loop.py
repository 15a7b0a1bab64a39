"""The loop that trains the embedded models, on a random tiny one."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from train_loop import (
    CONTEXT,
    Job,
    Phase,
    batches,
    learning_rate_factor,
    plain_attention,
    worker,
)
from transformers import AutoModelForCausalLM

BOS, VOCAB = 0, 16
PHASE = Phase(
    name="base",
    tokens=CONTEXT * 2 * 12,
    minutes=10.0,
    lr_matrices=0.02,
    lr_rest=0.02,
    batch_tokens=CONTEXT * 2,
    decay_from=0.5,
    full_context_from=0.5,
)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A text that repeats itself, and a model that can learn it in a dozen steps."""
    config = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": 1,
    }
    return Job(
        phases=[PHASE],
        streams={"base": [(1.0, torch.arange(2, VOCAB).repeat(200))]},
        config=config,
        folder=tmp_path,
        start=None,
        seed=0,
        microbatch_tokens=CONTEXT,
        compiled=False,
        checkpoint_minutes=10.0,
    )


def run(job: Job) -> dict:
    """Train in this process and return the record of the last phase."""
    worker(0, 1, job.folder / "rendezvous", job)
    return json.loads((job.folder / f"{job.phases[-1].name}.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_run_learns_and_leaves_an_ordinary_checkpoint(job: Job):
    record = run(job)
    assert record["tokens"] == PHASE.tokens
    assert record["last_loss"] < torch.tensor(float(VOCAB)).log()
    assert sorted(path.name for path in job.folder.iterdir()) == ["base", "base.json"]
    assert all(weight.dtype == torch.bfloat16 for weight in weights(job.folder / "base").values())
    config = json.loads((job.folder / "base" / "config.json").read_text())
    assert "attn_implementation" not in json.dumps(config)


def test_the_same_seed_gives_the_same_weights(job: Job, tmp_path: Path):
    run(job)
    again = dataclasses.replace(job, folder=tmp_path / "again")
    again.folder.mkdir()
    run(again)
    torch.testing.assert_close(weights(job.folder / "base"), weights(again.folder / "base"), rtol=0, atol=0)


def test_a_run_without_tokens_keeps_the_weights_it_starts_from(job: Job, tmp_path: Path):
    run(job)
    idle = dataclasses.replace(
        job, folder=tmp_path / "idle", start=job.folder / "base", phases=[dataclasses.replace(PHASE, tokens=0)]
    )
    idle.folder.mkdir()
    assert run(idle)["steps"] == 0
    torch.testing.assert_close(weights(idle.folder / "base"), weights(job.folder / "base"), rtol=0, atol=0)


def test_every_sequence_is_bos_and_a_piece_of_a_stream():
    stream = torch.arange(1, 1000)
    data = batches([(1.0, stream)], 4, 32, BOS, torch.Generator().manual_seed(0))
    for tokens_HS in itertools.islice(data, 20):
        assert tokens_HS.shape == (4, 32)
        assert (tokens_HS[:, 0] == BOS).all()
        assert (tokens_HS[:, 1:].diff(dim=1) == 1).all()


def test_an_epoch_reads_every_piece_once():
    stream = torch.arange(1, 1001)
    data = batches([(1.0, stream)], 1, 11, BOS, torch.Generator().manual_seed(0))
    firsts = [int(next(data)[0, 1]) for _ in range(98)]
    assert len(set(firsts)) == 98
    assert len({first % 10 for first in firsts}) == 1


def test_streams_are_drawn_with_their_shares():
    streams = [(0.8, torch.full((500,), 5)), (0.2, torch.full((500,), 6))]
    tokens_HS = next(batches(streams, 2000, 8, BOS, torch.Generator().manual_seed(0)))
    assert (tokens_HS[:, 1] == 5).float().mean().item() == pytest.approx(0.8, abs=0.05)


def test_the_learning_rate_warms_up_stays_and_decays_to_zero():
    phase = dataclasses.replace(PHASE, decay_from=0.4, warmup=0.1)
    factors = [learning_rate_factor(progress, phase) for progress in (0.0, 0.05, 0.1, 0.4, 0.7, 1.0)]
    assert 0 < factors[0] < factors[1] < 1
    assert factors[2:] == pytest.approx([1.0, 1.0, 0.5, 0.0])


def test_plain_attention_is_causal_attention():
    torch.manual_seed(0)
    q_HASE, k_HASE, v_HASE = torch.randn(3, 2, 3, 16, 8).unbind()
    ours, _ = plain_attention(torch.nn.Identity(), q_HASE, k_HASE, v_HASE, None, scaling=8**-0.5)
    theirs = torch.nn.functional.scaled_dot_product_attention(q_HASE, k_HASE, v_HASE, is_causal=True)
    torch.testing.assert_close(ours, theirs.transpose(1, 2))
