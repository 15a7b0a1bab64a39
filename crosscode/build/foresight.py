"""What can be told of a run before a language model is loaded: its names, its lengths, whether it fits into memory.

Axes: M models · P hookpoints · D width.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from crosscode.build.language_models import load_readers, locate
from crosscode.config.data import DataConfig, HarvestConfig
from crosscode.config.experiment import ExperimentConfig
from crosscode.config.language_models import LanguageModelConfig
from crosscode.data.harvest.harvester import check_hookpoints
from crosscode.data.harvest.hookpoints import told_widths
from crosscode.data.harvest.language_models import LanguageModel, available_device, by_tokenizer
from crosscode.data.harvest.loading import adapter_of, load_skeleton
from crosscode.data.harvest.loading_options import check_options, check_revision, packed_bits
from crosscode.data.harvest.tensor_parallel import check_tensor_parallel, n_weights_of_a_rank
from crosscode.data.shuffle import DEFAULT_CAPACITY
from crosscode.data.text.aligned import check_alignable
from crosscode.errors import InputError, at_field
from crosscode.models.base import BaseCrosscoder
from crosscode.parallel.group import n_ranks
from crosscode.parallel.teams import Teams
from crosscode.trainers.optimizers import OPTIMIZERS
from crosscode.weight_files import shape_and_dtype, tensor_names
from crosscode.widths import Widths


def check_language_models(config: HarvestConfig) -> Widths | None:
    """Each model's configuration, and whether its weights fit. Returns `foreseen_widths`.

    Raises:
        InputError: naming the field, its value and what would be right.
    """
    skeletons, teams = skeletons_of(config), Teams.of(config)
    weights: dict[torch.device | None, dict[str, int]] = {}
    for i, (lm, skeleton) in enumerate(zip(config.language_models, skeletons, strict=True)):
        if skeleton is not None and (teams is None or teams.holds(i)):
            n_together = 1 if teams is None else teams.size
            check_weights(lm, f"language_models.{i}", skeleton, config.device, weights, n_together)
    foreseen_reads(config.language_models)
    return foreseen_widths(skeletons, config.hookpoints)


def skeletons_of(config: HarvestConfig) -> list[LanguageModel | None]:
    """The models without weights, their hookpoints, lengths, token ids and options checked, wherever they are to run.

    Raises:
        InputError: naming the field, its value and what would be right.
    """
    skeletons = [skeleton_of(lm, f"language_models.{i}") for i, lm in enumerate(config.language_models)]
    for i, (lm, skeleton) in enumerate(zip(config.language_models, skeletons, strict=True)):
        if skeleton is None:
            continue
        check_hookpoints(skeleton, config.hookpoints)
        if (problem := _problem_of_tokens(config.data, i, lm, skeleton)) and not _reads_own_tokens(config, i):
            raise InputError(problem)
        if config.parallel.model > 1:
            check_tensor_parallel(skeleton, config.hookpoints, config.parallel.model)
        with at_field(f"language_models.{i}", LanguageModelConfig.model_fields):
            check_options(lm.device_map, lm.attn_implementation, lm.quantization, lm.trust_remote_code, skeleton)
    return skeletons


def _problem_of_tokens(data: DataConfig, i: int, lm: LanguageModelConfig, skeleton: LanguageModel) -> str | None:
    limit = skeleton.max_sequence_length
    if limit is not None and data.sequence_length > limit:
        return (
            f"data.sequence_length = {data.sequence_length}: language_models.{i} ({lm.short_name()}) takes at most {limit} "
            "positions"
        )
    if (token := max(data.mask_token_ids, default=-1)) >= skeleton.vocab_size:
        return (
            f"data.mask_token_ids: {token} is no token of language_models.{i} ({lm.short_name()}): ids are below "
            f"{skeleton.vocab_size}"
        )
    return None


def _reads_own_tokens(config: HarvestConfig, i: int) -> bool:
    """Whether a model cuts text in another way than the first: lengths and ids of tokens are the first one's."""
    return i > 0 and _reads([config.language_models[j] for j in (0, i)]) == [0, 1]


def foreseen_reads(configs: Sequence[LanguageModelConfig]) -> list[int] | None:
    """Which tokenizer each model reads, as `by_tokenizer` counts them; None where a GGUF file alone tells one of them.

    Raises:
        InputError: different tokenizers of which one cannot be aligned.
    """
    if len(configs) < 2:
        return [0] * len(configs)
    return None if any(config.is_gguf for config in configs) else _reads(configs)


def _reads(configs: Sequence[LanguageModelConfig]) -> list[int]:
    readers = load_readers(configs, {})
    reads_M, others = by_tokenizer(readers)
    check_alignable(readers[0].tokenizer, [other for other, _ in others])
    return reads_M


def foreseen_widths(skeletons: Sequence[LanguageModel | None], hookpoints: Sequence[str]) -> Widths | None:
    """Of each model at each hookpoint; None where activations alone tell one of them."""
    rows = [[None] if skeleton is None else told_widths(skeleton, hookpoints) for skeleton in skeletons]
    told = [tuple(width for width in row if width is not None) for row in rows]
    return Widths(told) if told and all(None not in row for row in rows) else None


def skeleton_of(config: LanguageModelConfig, field: str) -> LanguageModel | None:
    """None for a GGUF file, which has no configuration apart from its weights."""
    if config.revision is not None:
        with at_field(field, LanguageModelConfig.model_fields):
            check_revision(locate(config.path), config.revision)
    if config.is_gguf:
        return None
    with at_field(f"{field}.path = {config.path!r}"):
        return load_skeleton(locate(config.path), revision=config.revision, trust_remote_code=config.trust_remote_code)


def check_weights(
    config: LanguageModelConfig,
    field: str,
    skeleton: LanguageModel,
    default_device: str,
    weights: dict[torch.device | None, dict[str, int]],
    n_together: int = 1,
) -> None:
    """Raise `InputError` where a model's weights, beside those before it, need more memory than is free.

    Args:
        weights: bytes by device and base; those of this model are added.
        n_together: so many processes hold the model together.
    """
    dtype, packed, n_weights, n_base = _weights(config, skeleton, n_together)
    device = available_device(default_device) if config.device_map is None and config.device is None else None
    with at_field(field, LanguageModelConfig.model_fields):
        path = locate(config.path)
        adapter = adapter_of(path, config.revision, config.gguf_file, config.adapter, config.adapter_revision)
        device = device if config.device is None else available_device(config.device)
    there = _memory(device) if device is not None else _memory_of_all()
    on_device = weights.setdefault(device, {})
    on_device[f"{skeleton.name}@{skeleton.revision} {dtype} {config.quantization}"] = int(n_base)
    n_own = n_base
    if adapter is not None:
        on_device[str(adapter.folder)] = adapter.n_bytes
        n_own += adapter.n_bytes
    n_bytes = sum(on_device.values())
    if there is not None and n_bytes > there:
        beside = f" ({n_bytes / 2**30:.1f} GiB with the models before it)" if n_bytes > n_own else ""
        form = (" packed" if packed else f" in {dtype}") + ("" if adapter is None else " and those of the adapter")
        raise InputError(
            f"{field}.path = {config.path!r}: {n_weights / 1e9:.3g} billion weights{form} take "
            f"{n_own / 2**30:.1f} GiB{beside}, more than the {there / 2**30:.1f} GiB that are free on "
            f"{device or 'all devices'}; a smaller dtype, quantization, device_map: auto or parallel.model over several GPUs "
            "may fit"
        )


def _weights(config: LanguageModelConfig, skeleton: LanguageModel, n_together: int = 1) -> tuple[str, bool, int, float]:
    """The dtype, whether it is packed, how many there are (on one of several processes that hold it together), and the bytes
    that they take: at least so many, the table of tokens as it is, which no method packs unless told so, and no scales."""
    dtype = run_dtype(config, skeleton)
    packed = config.quantization or getattr(skeleton.model.config, "quantization_config", None)
    n_weights = n_weights_of_a_rank(skeleton, n_together)
    if not packed:
        return dtype, False, n_weights, n_weights * dtype_bytes(dtype)
    fields = packed if isinstance(packed, dict) else packed.to_dict()
    n_whole = skeleton.model.get_input_embeddings().weight.numel() // n_together
    n_whole *= not fields.get("include_input_output_embeddings")
    return dtype, True, n_weights, n_whole * dtype_bytes(dtype) + (n_weights - n_whole) * packed_bits(fields) / 8


def dtype_bytes(name: str) -> int:
    """Of a number of `torch`'s dtype of that name."""
    return getattr(torch, name).itemsize


def run_dtype(config: LanguageModelConfig, skeleton: LanguageModel) -> str:
    """In which a model runs. Where `auto` is asked for and its configuration names none, `transformers` takes that of the first
    weight of its files; float32 where they are not here to be looked at."""
    if config.dtype != "auto":
        return config.dtype
    found = skeleton.config.dtype
    if found is None:
        file = min(Path(locate(config.path)).expanduser().glob("*.safetensors"), default=None)
        dtypes = [] if file is None else [shape_and_dtype(file, name)[1] for name in tensor_names(file)]
        found = next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)
    return str(found).removeprefix("torch.")


def weight_bytes(config: LanguageModelConfig, skeleton: LanguageModel, n_together: int = 1) -> float:
    """Bytes of a model's weights on each of so many processes that hold it together, without those of an adapter."""
    return _weights(config, skeleton, n_together)[3]


def _memory_of_all() -> int | None:
    there = [_memory(torch.device("cpu"))]
    there += [_memory(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    return None if None in there else sum(n for n in there if n is not None)


def check_memory(config: ExperimentConfig, model: BaseCrosscoder, width: int, device: torch.device) -> None:
    """Raise `InputError` where weights, gradients and optimizer state, or the shuffle buffer, cannot fit.

    Args:
        model: the model of the config, on any device (the meta device will do).
    """
    optimizer = OPTIMIZERS.build(config.train.optimizer)
    copies: float = 1 + optimizer.grads_per_weight(model) + optimizer.states_per_weight
    if (ranks := n_ranks()) > 1:  # each has the whole weights before it keeps its share
        copies = max(1 + 1 / ranks, copies / ranks)
    n_bytes = int(copies * sum(param.numel() * param.element_size() for param in model.parameters()))
    size = "n_latents" if config.crosscoder.n_latents else "expansion_factor"
    what = "weights, gradients and optimizer state"
    _check_fits(f"crosscoder.{size}", getattr(config.crosscoder, size), n_bytes, device, what)
    M, P, capacity = len(config.language_models), len(config.hookpoints), config.data.shuffle_buffer_size
    rows = (0 if config.data.reads_stores() else DEFAULT_CAPACITY) if capacity is None else capacity
    n_bytes = rows * M * P * width * dtype_bytes(config.data.activation_dtype)
    what = f"activations of {M} x {P} x {width}"
    _check_fits("data.shuffle_buffer_size", rows, n_bytes, torch.device("cpu"), what)


def _check_fits(field: str, value: float, n_bytes: int, device: torch.device, what: str) -> None:
    there = _memory(device)
    if there is not None and n_bytes > there:
        raise InputError(
            f"{field} = {value}: {what} take {n_bytes / 2**30:.1f} GiB, more than the {there / 2**30:.1f} GiB that are "
            f"free on {device}; about {value * there / n_bytes:.3g} would fit"
        )


def _memory(device: torch.device) -> int | None:
    """Bytes that this process may still take; None: unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [_number(Path("/proc/meminfo"), "MemAvailable:", 1024)]
    group = Path("/sys/fs/cgroup")
    most, used = _number(group / "memory.max"), _number(group / "memory.current")
    limits.append(None if most is None or used is None else most - used)
    if hasattr(os, "sysconf"):
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        used = _number(Path("/proc/self/status"), "VmSize:", 1024)
        limits.append(None if most == resource.RLIM_INFINITY or used is None else most - used)
    return min((limit for limit in limits if limit is not None), default=None)


def _number(file: Path, line: str = "", unit: int = 1) -> int | None:
    """The number of a file of the kernel's, or of the line that begins so."""
    try:
        text = next(text for text in file.read_text().splitlines() if text.startswith(line))
        return int(text.removeprefix(line).split()[0]) * unit
    except (OSError, StopIteration, ValueError, IndexError):
        return None
