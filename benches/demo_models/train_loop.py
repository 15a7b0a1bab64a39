"""The training loop behind `train_models`: data parallel over single-threaded CPU processes.

One process a core beats one process with several threads here: the processes wait for each other once a step rather
than once an operator, so a busy machine costs less.

Letters: A attention heads (of all sequences), H sequences, S positions, E head dimension, V vocabulary.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from crosscode.files import new_folder, write_json

CONTEXT = 512
SHORT_CONTEXT = 128


@dataclass(frozen=True)
class Phase:
    """How one of the two models is trained.

    Attributes:
        name: folder of the result.
        tokens: length of the training.
        minutes: wall-clock limit; the schedule ends at whichever of the two is reached first, so a run cut short by the
            limit is still annealed (but no longer repeats exactly).
        lr_matrices, lr_rest: peak learning rates of Muon on the matrices, of AdamW on embedding and gains.
        batch_tokens: tokens an optimizer step, over all processes.
        decay_from: progress at which the linear decay to zero begins.
        full_context_from: progress from which sequences have the full context; before it they are `SHORT_CONTEXT` long,
            since attention is half of the cost otherwise.
    """

    name: str
    tokens: int
    minutes: float
    lr_matrices: float
    lr_rest: float
    batch_tokens: int
    decay_from: float
    full_context_from: float
    warmup: float = 0.01
    weight_decay: float = 0.1


@dataclass(frozen=True)
class Job:
    """What every process of a run is given: phases in order, their token streams with shares, where to save.

    `start` is a checkpoint to train on from, None for fresh weights.
    """

    phases: list[Phase]
    streams: dict[str, list[tuple[float, Tensor]]]
    config: dict[str, Any]
    folder: Path
    start: Path | None
    seed: int
    microbatch_tokens: int
    compiled: bool
    checkpoint_minutes: float


def batches(
    streams: list[tuple[float, Tensor]], sequences: int, length: int, bos_token_id: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Endless batches `tokens_HS`: BOS, then a piece of a stream that is drawn with its share, `length` ids in all.

    Every epoch over a stream cuts it at other places and shuffles the pieces.
    """
    sources = [_pieces(stream, length - 1, bos_token_id, generator) for _, stream in streams]
    shares = torch.tensor([share for share, _ in streams])
    while True:
        picks = torch.multinomial(shares, sequences, replacement=True, generator=generator).tolist()
        yield torch.stack([next(sources[pick]) for pick in picks])


def _pieces(stream: Tensor, length: int, bos_token_id: int, generator: torch.Generator) -> Iterator[Tensor]:
    bos = torch.tensor([bos_token_id])
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        starts = torch.arange(offset, len(stream) - length, length)
        for start in starts[torch.randperm(len(starts), generator=generator)].tolist():
            yield torch.cat([bos, stream[start : start + length]])


def plain_attention(
    module: nn.Module, q_HASE: Tensor, k_HASE: Tensor, v_HASE: Tensor, mask: None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention by two batched products: on CPUs with bf16 matrix units 3 times as fast as SDPA's backward."""
    shape_HASE = q_HASE.shape
    q_ASE, k_ASE, v_ASE = (x.reshape(-1, *shape_HASE[2:]) for x in (q_HASE * scaling, k_HASE, v_HASE))
    position_S = torch.arange(shape_HASE[2])
    scores_ASS = torch.bmm(q_ASE, k_ASE.transpose(1, 2)).float()
    scores_ASS = scores_ASS.masked_fill(position_S[None, :] > position_S[:, None], -3e4)
    out_ASE = torch.bmm(torch.softmax(scores_ASS, -1).to(v_ASE.dtype), v_ASE)
    return out_ASE.reshape(shape_HASE).transpose(1, 2).contiguous(), None


def make_loss(model: LlamaForCausalLM, compiled: bool) -> Callable[[Tensor], Tensor]:
    """`tokens_HS` to the mean cross entropy of the next token, in bf16 with float32 weights."""

    def loss(tokens_HS: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits_HSV = model(input_ids=tokens_HS, use_cache=False).logits
        return F.cross_entropy(logits_HSV[:, :-1].flatten(0, 1).float(), tokens_HS[:, 1:].flatten())

    return torch.compile(loss, dynamic=False) if compiled else loss


def make_optimizers(model: LlamaForCausalLM, phase: Phase) -> list[torch.optim.Optimizer]:
    """Muon on the blocks' matrices, AdamW on the embedding and the gains."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=phase.lr_matrices, weight_decay=phase.weight_decay, momentum=0.95),
        torch.optim.AdamW(rest, lr=phase.lr_rest, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate_factor(progress: float, phase: Phase) -> float:
    """Warm-up, plateau, linear decay to zero, over `progress` in [0, 1]."""
    if progress < phase.warmup:
        return (progress + 1e-3) / (phase.warmup + 1e-3)
    return min(1.0, max(0.0, (1.0 - progress) / (1.0 - phase.decay_from)))


def synchronise(model: nn.Module, extra: list[float]) -> list[float]:
    """Average the gradients and the numbers of `extra` over the processes, the same bits in each."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients] + [torch.tensor(extra)])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    at = 0
    for gradient in gradients:
        gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
        at += gradient.numel()
    return flat[at:].tolist()


def train(model: LlamaForCausalLM, phase: Phase, job: Job, save: Callable[[], None]) -> dict[str, Any]:
    """Train in place, in every process alike; returns tokens, steps, seconds and the last loss."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(job.seed + rank)
    sequences = {length: phase.batch_tokens // length // world for length in (SHORT_CONTEXT, CONTEXT)}
    data = {
        length: batches(job.streams[phase.name], count, length, job.config["bos_token_id"], generator)
        for length, count in sequences.items()
    }
    loss_of = make_loss(model, job.compiled)
    optimizers = make_optimizers(model, phase)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    start = last_save = last_log = time.monotonic()
    tokens, step, smooth = 0, 0, 0.0
    progress = 0.0 if phase.tokens else 1.0
    while progress < 1:
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * learning_rate_factor(progress, phase)
        length = CONTEXT if progress >= phase.full_context_from else SHORT_CONTEXT
        parts = next(data[length]).split(max(1, job.microbatch_tokens // length))
        loss = 0.0
        for part_HS in parts:
            part = loss_of(part_HS) / len(parts)
            part.backward()
            loss += part.item()
        tokens += sequences[length] * length * world
        step += 1
        now = time.monotonic()
        # The processes agree on the progress, since the learning rate and the end depend on it.
        progress = max(tokens / phase.tokens, (now - start) / (60 * phase.minutes))
        loss, progress = synchronise(model, [loss, progress])
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        smooth = loss if step == 1 else 0.95 * smooth + 0.05 * loss
        if rank == 0 and now - last_log > 20:
            state = f"step {step} progress {progress:.3f} loss {smooth:.3f} tokens/s {tokens / (now - start):.0f}"
            print(f"  {phase.name} {state}", flush=True)
            last_log = now
        if rank == 0 and now - last_save > 60 * job.checkpoint_minutes:
            save()
            last_save = now
    seconds = round(time.monotonic() - start, 1)
    return {"tokens": tokens, "steps": step, "seconds": seconds, "last_loss": round(smooth, 4)}


def worker(rank: int, world: int, rendezvous: Path, job: Job) -> None:
    """One process of a run: all phases, one after the other on one model; process 0 saves."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    AttentionInterface.register("plain", plain_attention)
    torch.manual_seed(job.seed)
    model = LlamaForCausalLM(LlamaConfig(**job.config))
    model.set_attn_implementation("plain")
    if job.start:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(job.start, dtype=torch.float32).state_dict())
    for phase in job.phases:
        if rank == 0:
            print(f"training {phase}", flush=True)
        result = train(model, phase, job, lambda name=phase.name: save_weights(model, job, name))
        if rank == 0:
            save_weights(model, job, phase.name)
            write_json(job.folder / f"{phase.name}.json", {**asdict(phase), **result})
    dist.destroy_process_group()


def save_weights(model: LlamaForCausalLM, job: Job, name: str) -> None:
    """Write a bf16 checkpoint so that a reader sees the old files or the new ones, each whole."""
    clone = LlamaForCausalLM(LlamaConfig(**job.config))
    clone.load_state_dict(model.state_dict())
    with new_folder(job.folder / name, index="config.json") as folder:
        clone.bfloat16().save_pretrained(folder)
        for file in folder.iterdir():
            file.chmod(0o644)
