"""Language models as the source of activations: a hub name, a local folder, a GGUF file or an in-memory model.

Every way in ends in the same frozen `LanguageModel`: eval mode, no gradients, one tokenizer, one fingerprint.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from crosscode.data.text.tokenizers import load_tokenizer, tokenizer_difference
from crosscode.errors import InputError, first_line

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
    """

    model: Any
    tokenizer: Any
    name: str
    revision: str | None = None
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @property
    def config(self) -> Any:
        """The text part of the model's `transformers` configuration."""
        return self.model.config.get_text_config()

    @property
    def n_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def d_model(self) -> int:
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
        limit = getattr(self.config, "max_position_embeddings", None)
        limits = [int(limit)] if limit else []
        for path, module in self.model.named_modules():
            if isinstance(module, torch.nn.Embedding) and _POSITIONS.search(path):
                after_padding = 0 if module.padding_idx is None else module.padding_idx + 1
                first = getattr(module, "offset", None) or after_padding
                limits.append(module.num_embeddings - first)
        return min(limits, default=None)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def fingerprint(self) -> str:
        """16 hex digits of the weights: names, shapes, dtypes and an exact integer checksum of every tensor's bits.

        Two models that differ in one weight differ in it, and two in which weights changed places. It reads every
        weight, at memory speed, on the model's own device, and does not depend on the device.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
            digest.update(_bit_sums(tensor))
        return digest.hexdigest()[:16]


def _bit_sums(tensor: torch.Tensor) -> bytes:
    """Sums of the bit patterns over consecutive blocks and across them: weights that change places are seen as well.

    Integer arithmetic, so the order of addition is no matter.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[flat.element_size()]
    flat = flat.view(bits) if flat.dtype != torch.bool else flat.to(torch.uint8)
    block = -(-flat.numel() // _FINGERPRINT_BLOCKS) or 1
    whole = flat.numel() // block * block
    blocks = flat[:whole].view(-1, block)
    sums = [blocks.sum(dim=dim, dtype=torch.int64) for dim in (1, 0)]
    return torch.cat([*sums, flat[whole:].long()]).cpu().numpy().tobytes()


def load_language_model(
    name_or_path: str,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a model and its tokenizer, if it has one, with `transformers`.

    `name_or_path`: a hub name, a folder, or a `.gguf` file (the same as its folder plus `gguf_file`).
    `dtype`: "float32", "bfloat16" or "float16", of the weights and of the run.
    Raises InputError when the folder or file is missing, the dtype is unknown or the hub has no such model.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    source, gguf_file = _find_source(name_or_path, gguf_file)

    from transformers import AutoModelForCausalLM

    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if gguf_file is not None:
        common["gguf_file"] = gguf_file
    dense = _dense_gguf_options() if gguf_file is not None else {}
    with _one_line_errors(name_or_path, revision):
        place = available_device(device)
        _check_no_adapter(source, revision)
        tokenizer = load_tokenizer(source, common)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=DTYPES[dtype], output_loading_info=True, **common, **dense
        )
        model, info = loaded
        _check_nothing_is_missing(model, info["missing_keys"])
    name = f"{source}/{gguf_file}" if gguf_file is not None else name_or_path
    return _freeze(model.to(place), tokenizer, name, revision)


def _check_no_adapter(source: str, revision: str | None) -> None:
    """`transformers` reads the weights beside an adapter and passes over it, or over them, as other packages are there."""
    from transformers.utils.peft_utils import find_adapter_config_file

    folder = Path(source)
    if folder.is_dir():
        found = next((file.name for file in sorted(folder.iterdir()) if file.name.startswith("adapter_")), None)
    else:
        found = find_adapter_config_file(source, revision=revision) and "adapter_config.json"
    if found is not None:
        raise InputError(
            f"{found!r} is there, an adapter, which would not be applied; merge it into the weights (peft: "
            "merge_and_unload, then save_pretrained) and name that folder, or move the adapter away"
        )


def available_device(name: str | torch.device) -> torch.device:
    """The device of that name, `auto` for the best one here, or `InputError` with the reason."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device = {str(name)!r}: not available here ({first_line(error)})") from error
    return device


def _check_nothing_is_missing(model: Any, missing: Collection[str]) -> None:
    """`transformers` fills weights that a checkpoint lacks with random numbers, and says so in a warning alone."""
    if missing:
        n_all = sum(1 for _ in model.parameters())
        raise InputError(f"{len(missing)} of its {n_all} weights are not in the files ({min(missing)}, ...)")


def load_skeleton(name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> LanguageModel:
    """The modules of a model without its weights and without a tokenizer, from its configuration alone.

    Enough to check hookpoints before anything expensive is loaded. Not for GGUF files.
    """
    source, gguf_file = _find_source(name_or_path, None)
    if gguf_file is not None:
        raise InputError(f"language model {name_or_path!r}: a GGUF file has no configuration apart from its weights")

    from transformers import AutoConfig, AutoModelForCausalLM

    with _one_line_errors(name_or_path, revision), torch.device("meta"):
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return _freeze(model, None, name_or_path, revision)


def _find_source(name_or_path: str, gguf_file: str | None) -> tuple[str, str | None]:
    """What `transformers` is to load, and the GGUF file in it; a missing folder or file is refused here."""
    path = Path(name_or_path).expanduser()
    if path.suffix == ".gguf" and gguf_file is None:
        name_or_path, gguf_file = str(path.parent), path.name
        path = path.parent
    if not path.is_dir():
        if _looks_like_a_path(name_or_path):
            raise InputError(f"language model {name_or_path!r}: no such folder")
        return name_or_path, gguf_file
    if gguf_file is not None and not (path / gguf_file).is_file():
        raise InputError(f"gguf_file: {gguf_file!r} is not in folder {str(path)!r}")
    if gguf_file is None and not (path / "config.json").is_file():
        with _one_line_errors(name_or_path, None):
            _check_no_adapter(str(path), None)
        raise InputError(f"language model {name_or_path!r}: the folder holds no config.json")
    return str(path), gguf_file


@contextmanager
def _one_line_errors(name_or_path: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, ImportError) as error:
        reason = first_line(error)
        if "ignore_mismatched_sizes" in reason:
            reason = "its files hold weights of other shapes than its config.json describes"
        elif reason.endswith(":"):
            reason = " ".join(str(error).split())[:200]
        raise InputError(f"language model {name_or_path!r} (revision {revision}) cannot be loaded: {reason}") from error


def _dense_gguf_options() -> dict[str, Any]:
    """Unpack quantised weights once: packed ones would be unpacked again in every forward pass of a harvest.

    Versions of `transformers` without the option always unpack.
    """
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def wrap_language_model(hf_model: Any, tokenizer: Any, name: str = "in-memory") -> LanguageModel:
    """Use a `transformers` model that is already in memory; it is put in eval mode and its gradients switched off."""
    return _freeze(hf_model, tokenizer, name, None)


def check_common_tokenizer(models: Sequence[LanguageModel]) -> None:
    """Raise InputError unless every model has the first one's vocabulary and cuts text in the same way.

    Which token ends a sequence may differ (a chat model often ends with another token than its base): ids and
    their meaning may not.
    """
    first = models[0]
    for other in models[1:]:
        difference = tokenizer_difference(first.tokenizer, other.tokenizer)
        if difference:
            raise InputError(f"models {first.name!r} and {other.name!r} have different tokenizers: {difference}")


def _freeze(model: Any, tokenizer: Any, name: str, revision: str | None) -> LanguageModel:
    model.eval()
    model.requires_grad_(False)
    return LanguageModel(model=model, tokenizer=tokenizer, name=name, revision=revision)


def _looks_like_a_path(name: str) -> bool:
    """Hub names are `name` or `owner/name`; anything else that is not there is a missing folder."""
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or name.endswith(("/", ".gguf"))
