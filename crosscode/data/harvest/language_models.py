"""Language models as the source of activations: every way in (`loading`, `adapters`, a model in memory) ends in the same
frozen `LanguageModel`: eval mode, no gradients, one tokenizer, one fingerprint.
"""

from __future__ import annotations

import copy
import hashlib
import re
import threading
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed as dist

from crosscode.data.text.tokenizers import tokenizer_difference
from crosscode.errors import InputError, first_line, rank_lost

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_FINGERPRINT_BLOCKS = 256
_POSITIONS = re.compile(r"(wpe|(?<!rel_)(?<!relative_)pos\w*)$")
"""Last part of the path of a table with a row for each absolute position."""


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A `transformers` causal language model, ready to be read.

    `model` is in eval mode and none of its parameters require gradients. `tokenizer` is None where a model comes without
    one: it is run on token ids. `name` is what the user called it (hub name,
    folder, or a free name for an in-memory model), `revision` the hub revision asked for, if any. `lock` is held by
    whoever has hooks on the modules: training and evaluation may harvest from one model in different threads.
    With an adapter, `model` has it in its modules, `peft_model` is the `PeftModel` around it, and `adapter_rules` say how
    its weights act. `n_ranks` hold its weights together, which must run it together; where other ranks hold it, `model` is
    without weights. Then `known_fingerprint` was computed once by those that hold them.
    """

    model: Any
    tokenizer: Any
    name: str
    revision: str | None = None
    peft_model: Any = field(default=None, repr=False)
    adapter_rules: str = field(default="", repr=False)
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    n_ranks: int = 1
    known_fingerprint: str = field(default="", repr=False)

    @property
    def config(self) -> Any:
        """The text part of the model's `transformers` configuration."""
        return self.model.config.get_text_config()

    @property
    def n_layers(self) -> int:
        """Blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def d_model(self) -> int:
        """Width D of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding: token ids at or above it cannot be run."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def max_sequence_length(self) -> int | None:
        """Longest sequence that the configuration names and the tables of positions hold; None: no limit is known.

        A table with a row for padding counts positions from the row after it (RoBERTa), or from its `offset` (OPT).
        """
        limit = getattr(self.config, "max_position_embeddings", None) or 0
        limits = [int(limit)] if limit > 0 else []  # -1: none (XLNet)
        for path, module in self.model.named_modules():
            if isinstance(module, torch.nn.Embedding) and _POSITIONS.search(path):
                after_padding = 0 if module.padding_idx is None else module.padding_idx + 1
                first = getattr(module, "offset", None) or after_padding
                limits.append(module.num_embeddings - first)
        return min(limits, default=None)

    @property
    def device(self) -> torch.device:
        """Where its first parameter is."""
        return next(self.model.parameters()).device

    @property
    def is_here(self) -> bool:
        """Whether it can be run: a skeleton, and a model that other ranks hold, cannot."""
        return self.device.type != "meta"

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around a run, for one thread at a time.

        Raises:
            RankLost: one of the ranks that hold it together has ended.
        """
        with self.lock, ranks_answer(self.n_ranks):
            yield

    @property
    def dtype(self) -> torch.dtype:
        """Of its first parameter: in which it runs."""
        return next(self.model.parameters()).dtype

    def plain_tree(self) -> Any:
        """A copy of the module tree that shares every weight; an adapter is merged in it, equal to rounding, and what it
        changes has weights of its own."""
        if self.peft_model is None:
            return shared_copy(self.model)
        adapted = [module.base_layer for module in self.peft_model.modules() if hasattr(module, "base_layer")]
        packed = {id(weight) for layer in adapted if is_packed(layer) for weight in layer.parameters(recurse=False)}
        whole = shared_copy(self.peft_model, besides=packed)
        for layer in [module.base_layer for module in whole.modules() if hasattr(module, "base_layer")]:
            if not is_packed(layer):  # tied weights are merged in the module alone that is adapted
                for name, weight in layer.named_parameters(recurse=False):
                    setattr(layer, name, torch.nn.Parameter(weight.detach().clone(), requires_grad=False))
        return whole.merge_and_unload()

    def facts(self) -> dict[str, Any]:
        """What a saved coder says of it, beside its name and fingerprint."""
        return {"class": type(self.model).__name__, "n_layers": self.n_layers, "d_model": self.d_model}

    def fingerprint(self) -> str:
        """16 hex digits of the weights: names, shapes, dtypes and an exact integer checksum of every tensor's bits.

        Two models that differ in one weight differ in it, and two in which weights changed places. It reads every
        weight, at memory speed, on the model's own device, and does not depend on the device.
        """
        if self.known_fingerprint:
            return self.known_fingerprint
        digest = hashlib.sha256(self.adapter_rules.encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
            digest.update(_bit_sums(tensor))
        return digest.hexdigest()[:16]


@contextmanager
def ranks_answer(n_ranks: int) -> Iterator[None]:
    """Within the block, what a collective of several ranks raises is `RankLost`."""
    try:
        yield
    except RuntimeError as error:
        is_of_ranks = isinstance(error, dist.DistError) or re.search("gloo|nccl", str(error), re.IGNORECASE)
        if n_ranks > 1 and is_of_ranks:
            raise rank_lost(error) from error
        raise


def _bit_sums(tensor: torch.Tensor) -> bytes:
    """Sums of the bit patterns over consecutive blocks and across them: weights that change places are seen as well.

    Integer arithmetic, so the order of addition is no matter.
    """
    tensor = tensor.detach()
    whole = getattr(tensor, "full_tensor", None)  # of one that ranks hold together, and all ask for
    parts = getattr(tensor, "__tensor_flatten__", None)  # of one that a quantisation library packs
    if whole is None and parts is not None:
        return b"".join(_bit_sums(getattr(tensor, name)) for name in parts()[0])
    flat = (tensor if whole is None else whole()).contiguous().reshape(-1)
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[flat.element_size()]
    flat = flat.view(bits) if flat.dtype != torch.bool else flat.to(torch.uint8)
    block = -(-flat.numel() // _FINGERPRINT_BLOCKS) or 1
    n_even = flat.numel() // block * block
    blocks = flat[:n_even].view(-1, block)
    sums = [blocks.sum(dim=dim, dtype=torch.int64) for dim in (1, 0)]
    return torch.cat([*sums, flat[n_even:].long()]).cpu().numpy().tobytes()


def available_device(name: str | torch.device) -> torch.device:
    """The device of that name, `auto` for the best one here, or `InputError` with the reason."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if str(name).partition(":")[0] == "meta":
        raise InputError(f"device = {str(name)!r}: holds no numbers; name one that does, or auto")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device = {str(name)!r}: not available here ({first_line(error)})") from error
    return device


def wrap_language_model(hf_model: Any, tokenizer: Any, name: str = "in-memory") -> LanguageModel:
    """Use a `transformers` model that is already in memory, `hf_model`; it is put in eval mode and its gradients switched off.
    `tokenizer`: its own, or None where it is run on token ids; `name`: what messages and figures call it."""
    return freeze(hf_model, tokenizer, name, None)


def by_tokenizer(models: Sequence[LanguageModel]) -> tuple[list[int], list[tuple[Any, int | None]]]:
    """For each model 0 where it cuts text as the first one does, into the same ids, else the number, from 1, of the tokenizer
    among those that are listed: each once, with the positions that all of its models take (None: any).

    Which token ends a sequence may differ (a chat model often ends with another token than its base): ids and
    their meaning may not.
    """
    distinct, limits, reads_M = [models[0].tokenizer], [list[int | None]()], list[int]()
    for model in models:
        same = (i for i, one in enumerate(distinct) if tokenizer_difference(one, model.tokenizer) is None)
        number = next(same, len(distinct))
        if number == len(distinct):
            if model.tokenizer is None or models[0].tokenizer is None:
                difference = tokenizer_difference(models[0].tokenizer, model.tokenizer)
                raise InputError(
                    f"models {models[0].name!r} and {model.name!r} have different tokenizers: {difference}"
                )
            distinct.append(model.tokenizer)
            limits.append([])
        reads_M.append(number)
        limits[number].append(model.max_sequence_length)
    least = [min((limit for limit in of_one if limit), default=None) for of_one in limits]
    return reads_M, list(zip(distinct, least, strict=True))[1:]


def freeze(model: Any, tokenizer: Any, name: str, revision: str | None, **more: Any) -> LanguageModel:
    model.eval()
    model.requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes 0.50 repacks 4 bits at the first run on such a CPU, and unpacks them wrongly for a state dict
            module.support_avx512bf16_for_cpu = False
    return LanguageModel(model=model, tokenizer=tokenizer, name=name, revision=revision, **more)


def shared_copy(tree: Any, besides: Set[int] = frozenset()) -> Any:
    """A copy of a module tree over the same parameters and buffers, but for those whose `id` is in `besides`.

    Modules of packed weights are shared whole: bitsandbytes moves scales of 8 bits from a weight to the module that runs first.
    """
    tensors = [tensor for tensor in (*tree.parameters(), *tree.buffers()) if id(tensor) not in besides]
    packed = [
        module
        for module in tree.modules()
        if is_packed(module) and besides.isdisjoint(id(weight) for weight in module.parameters(recurse=False))
    ]
    return copy.deepcopy(tree, {id(shared): shared for shared in (*tensors, *packed)})


def is_packed(module: torch.nn.Module) -> bool:
    """Whether it holds its weights as a quantisation library packs them: as integers, or in a class of tensors of its own."""
    return any(
        type(weight) is not torch.nn.Parameter or not weight.is_floating_point()
        for weight in module.parameters(recurse=False)
    )
