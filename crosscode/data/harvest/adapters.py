"""Adapters (`peft`) on a language model: a module tree of their own over the weights of the base, which are held once."""

from __future__ import annotations

import copy
import json
import logging
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any

import torch

from crosscode.data.harvest.language_models import LanguageModel, freeze, shared_copy
from crosscode.data.hub import look_for_hub
from crosscode.data.text.tokenizers import TOKENIZER_FILES, load_tokenizer
from crosscode.errors import InputError, fitting

log = logging.getLogger("crosscode")

_CONFIG = "adapter_config.json"
_BESIDE = re.compile(r"(^|_)(adapter|lora)_|_adapter\.")
"""Of peft, and of other libraries: pytorch_adapter.bin, pytorch_lora_weights.safetensors, non_lora_trainables.bin."""
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_MORE_WEIGHTS = re.compile(r"^(?!adapter_model\.).*\.safetensors$|^(non_lora_trainables|pytorch_model).*\.(bin|pt)$")
_PREFIX = "base_model.model."
_KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")
"""Initialisations of LoRA that leave the base as it is; the others (PiSSA, OLoRA, ...) take something out of it."""
_NO_MATTER = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "task_type", "peft_version")


@dataclass(frozen=True)
class Adapter:
    """The files of an adapter, in a folder of this machine.

    `name` is what the user called it, `revision` the hub revision asked for, `config` its `adapter_config.json`.
    """

    folder: Path
    name: str
    revision: str | None
    config: Mapping[str, Any] = field(repr=False)

    @property
    def base(self) -> str | None:
        """The model that it was trained on."""
        return self.config.get("base_model_name_or_path")

    @property
    def base_revision(self) -> str | None:
        return self.config.get("revision")

    @property
    def n_bytes(self) -> int:
        """Of its weights, as they are stored."""
        return next(file.stat().st_size for name in _WEIGHTS if (file := self.folder / name).is_file())


def find_adapter(name: str, revision: str | None) -> Adapter | None:
    """The adapter in a folder, or in a hub repository (`OWNER/NAME`, `OWNER/NAME/SUBFOLDER`), None where there is none.

    Of a hub repository its files are downloaded. Raises InputError for one without weights, or with more of
    them than `peft` reads.
    """
    from transformers.utils.hub import cached_file

    folder, options = Path(name).expanduser(), {}
    if folder.is_dir():
        repo, found = str(folder), [folder / file for file in (_CONFIG, *_WEIGHTS) if (folder / file).is_file()]
    else:
        look_for_hub()
        *owner_and_name, subfolder = [*name.split("/", 2), *([""] * (2 - name.count("/")))][:3]
        repo = "/".join(part for part in owner_and_name if part)
        options = {"revision": revision, "subfolder": subfolder, "_raise_exceptions_for_missing_entries": False}
        names = (_CONFIG, *_WEIGHTS[:1])
        paths = [cached_file(repo, file, **options) for file in names]
        if paths[0] and not paths[1]:
            paths.append(cached_file(repo, _WEIGHTS[1], **options))
        found = [Path(path) for path in paths if path]
    if not found or found[0].name != _CONFIG:
        return None
    if len(found) == 1:
        raise InputError(f"adapter {name!r}: {_CONFIG} is there, but no {' or '.join(_WEIGHTS)}")
    unused = [file.name for file in sorted(found[0].parent.iterdir()) if _MORE_WEIGHTS.search(file.name)]
    if unused:
        raise InputError(
            f"adapter {name!r}: its file {unused[0]!r} would not be used; move it away if it is not needed"
        )
    if options:
        for file in TOKENIZER_FILES:
            cached_file(repo, file, **options)
    try:
        config = json.loads(found[0].read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"adapter {name!r}: {_CONFIG} is no JSON ({error})") from error
    named = [config.get(key) for key in ("base_model_name_or_path", "revision")] if isinstance(config, dict) else [0]
    if not all(value is None or isinstance(value, str) for value in named):
        raise InputError(f"adapter {name!r}: {_CONFIG} does not describe an adapter")
    return Adapter(found[0].parent, name, revision, config)


def check_no_adapter(source: str, revision: str | None) -> None:
    """Raise InputError for an adapter beside the weights of a model: `transformers` passes over it, or over them, as other
    packages are there."""
    from transformers.utils.peft_utils import find_adapter_config_file

    folder = Path(source)
    if folder.is_dir():
        found = next((file.name for file in sorted(folder.iterdir()) if _BESIDE.search(file.name)), None)
    else:
        found = find_adapter_config_file(source, revision=revision) and "adapter_config.json"
    if found is not None:
        raise InputError(
            f"{found!r} is there, an adapter beside the weights of a model, which would not be applied: move it into a "
            "folder of its own, and name that as adapter if it is meant"
        )


def apply_adapter(base: LanguageModel, adapter: Adapter, scale: float = 1.0, dtype: str = "float32") -> LanguageModel:
    """`base` with the adapter, as `peft` runs it, unmerged: `model` is the plain class with the adapter in its modules.

    The weights are those of `base`, but for what the adapter brings or replaces; `base` stays as it is. `scale`
    multiplies what LoRA adds. `dtype`: of the adapter on a base in half precision, "float32" as `peft` has it, or "auto".

    Raises:
        InputError: `peft` is not installed; files that do not fit the base, or of which a part would not be used; an
            adapter that changes no logit, that acts outside of modules (prompts), or that `scale` does not reach whole.
    """
    try:
        import peft
    except ImportError as error:
        raise InputError(
            f"adapter {adapter.name!r}: needs the package peft; try: pip install 'crosscode[peft]'"
        ) from error
    if scale != 1:
        _check_scale(adapter, scale)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), fitting(f"adapter {adapter.name!r}"):
        warnings.simplefilter("ignore")
        config = peft.PeftConfig.from_pretrained(str(adapter.folder))
        how = "adds tokens to the text" if config.is_prompt_learning else "acts after certain tokens alone"
        if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
            raise InputError(f"adapter {adapter.name!r}: {_kind(config)} {how}; only weights can be adapted")
        if str(init := getattr(config, "init_lora_weights", True)).startswith("pissa_niter"):
            what = f"init_lora_weights = {init!r} took a random part out of the base, which its files do not hold"
            raise InputError(
                f"adapter {adapter.name!r}: {what}; save it as plain LoRA, or with init_lora_weights = 'pissa'"
            )
        config.inference_mode = True
        tensors = peft.utils.load_peft_weights(str(adapter.folder), device="cpu")
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise InputError(f"adapter {adapter.name!r}: weights that are not finite, in {key!r}")
        tree = _prepared_tree(base.model, config, tensors)
        before = _states(base.model)
        cast = dtype == "float32"
        whole = peft.PeftModel(tree, config, autocast_adapter_dtype=cast)
        result = whole.load_adapter(
            str(adapter.folder), "default", torch_device=str(base.device), autocast_adapter_dtype=cast
        )
    if before != _states(base.model):
        raise InputError(f"adapter {adapter.name!r}: {_kind(config)} would change the weights of {base.name!r} itself")
    unused = [key for key in result.unexpected_keys if not _is_said_twice(key, tensors)]
    missing = _never_loaded(whole, result.missing_keys)
    for what, keys in (("unexpected", unused), ("missing", missing)):
        if keys:
            place = f"its files are not for {base.name!r} ({type(base.model).__name__})"
            raise InputError(f"adapter {adapter.name!r}: {place}: {len(keys)} weights are {what} ({min(keys)}, ...)")
    if scale != 1:
        for module in whole.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.scale_layer(scale)
    for module in whole.modules():
        if type(module) is peft.tuners.lora.Linear and "forward" not in vars(module):
            module.forward = MethodType(_lora_forward, module)
    tokenizer = load_tokenizer(str(adapter.folder), {"revision": None}) or base.tokenizer
    revision, scaled = adapter.revision and f"@{adapter.revision}", "" if scale == 1 else f" x {scale:g}"
    rules = {name: value for name, value in adapter.config.items() if name not in _NO_MATTER}
    adapted = freeze(
        whole.get_base_model(),
        tokenizer,
        f"{base.name} + {adapter.name}{revision or ''}{scaled}",
        base.revision,
        peft_model=whole,
        adapter_rules=json.dumps({**rules, "scale": scale}, sort_keys=True),
    )
    _check_effect(base, adapted, whole, adapter)
    return adapted


def _lora_forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """As `peft` computes it, to the bit (in the dtype of LoRA), but with one tensor of the size of the
    output beside it rather than three; without gradients, and where there is nothing but plain LoRA."""
    plain = not (torch.is_grad_enabled() or layer.training or layer.disable_adapters or layer.merged or args or kwargs)
    if plain and layer.active_adapters == ["default"] and "default" in layer.lora_A and not layer.lora_variant:
        lora_A, lora_B, scaling = (own["default"] for own in (layer.lora_A, layer.lora_B, layer.scaling))
        if layer.base_layer.weight.is_floating_point():
            out = layer.base_layer(x)
            added = lora_B(lora_A(x.to(lora_A.weight.dtype)))
            added = added if scaling == 1 else added.mul_(scaling)
            return out.add_(added) if out.dtype == added.dtype else out.copy_(added.add_(out))
    return type(layer).forward(layer, x, *args, **kwargs)


def _prepared_tree(model: Any, config: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """A tree over the same weights, but for those that the adapter's files replace, with embeddings of their size."""
    takes_from_base = getattr(config, "init_lora_weights", True) not in _KEEPS_BASE
    targets = getattr(config, "target_modules", None)
    if takes_from_base and (not targets or targets == "all-linear"):
        return copy.deepcopy(model)
    brought = {key.removeprefix(_PREFIX).replace(".base_layer.", "."): tensor for key, tensor in tensors.items()}
    copied_by_peft = getattr(config, "modules_to_save", None) or ()
    private = {
        id(weight)
        for name, weight in model.named_parameters(remove_duplicate=False)
        if name in brought and not any(part in copied_by_peft for part in name.split("."))
    }
    if takes_from_base:
        private |= {id(weight) for module in _targeted(model, config) for weight in module.parameters()}
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    table = brought.get(f"{name}.weight")
    n_rows = len(embedding.weight if table is None else table)
    if n_rows == len(embedding.weight):
        return shared_copy(model, besides=private)
    ends = [module for module in (embedding, model.get_output_embeddings()) if module is not None]
    tree = shared_copy(model, besides=private | {id(weight) for module in ends for weight in module.parameters()})
    tree.resize_token_embeddings(n_rows, mean_resizing=False)
    return tree


def _targeted(model: Any, config: Any) -> list[Any]:
    """The modules that an adapter is put on."""
    from peft.tuners.tuners_utils import check_target_module_exists

    return [module for name, module in model.named_modules() if check_target_module_exists(config, name)]


def _is_said_twice(key: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Of modules that are saved whole, resized ones stand three times: as they are, again, and as they were."""
    for infix in (".modules_to_save.", ".original_module."):
        again = tensors.get(key.replace(infix, "."))
        if infix in key and again is not None:
            return infix == ".original_module." or torch.equal(tensors[key], again)
    return False


def _never_loaded(whole: Any, missing: Collection[str]) -> list[str]:
    """Of the names that the files do not hold, those of weights that no other name loaded (VBLoRA's modules share a bank)."""
    weights = whole.state_dict(keep_vars=True)
    loaded = {id(weight) for name, weight in weights.items() if name not in missing}
    return [name for name in missing if id(weights.get(name)) not in loaded]


def _states(model: Any) -> list[tuple[int, int]]:
    """Where each weight lies and how often it was written to."""
    return [(tensor.data_ptr(), tensor._version) for tensor in model.parameters()]


def _kind(config: Any) -> str:
    return f"an adapter of type {config.peft_type.value}"


def _check_scale(adapter: Adapter, scale: float) -> None:
    """Raise InputError where a part of what an adapter does is no addition that could be scaled."""
    config = adapter.config
    whole = ("modules_to_save", "trainable_token_indices", "use_dora")
    parts = [name for name in whole if config.get(name)] + ["bias"] * (config.get("bias", "none") != "none")
    if config.get("peft_type") != "LORA":
        parts.insert(0, f"peft_type {config.get('peft_type')}")
    if parts:
        raise InputError(
            f"adapter_scale = {scale}: scales what LoRA adds, but adapter {adapter.name!r} has {parts[0]}, which is no "
            "addition; leave it at 1"
        )


@torch.no_grad()
def _check_effect(base: LanguageModel, adapted: LanguageModel, whole: Any, adapter: Adapter) -> None:
    """Raise InputError for an adapter that changes no logit, or that does not act through the modules alone."""
    size = min(base.vocab_size, adapted.vocab_size)
    tokens_HS = torch.randint(size, (2, 8), generator=torch.Generator().manual_seed(0)).to(base.device)
    plain, mine, all_of_it = (
        model(input_ids=tokens_HS, use_cache=False).logits for model in (base.model, adapted.model, whole)
    )
    if plain.isfinite().all() and not mine.isfinite().all():
        raise InputError(f"adapter {adapter.name!r}: logits of {base.name!r} are not finite with it")
    if not torch.equal(mine, all_of_it):
        raise InputError(f"adapter {adapter.name!r}: acts outside of the model's modules, and cannot be harvested")
    if base.vocab_size == adapted.vocab_size and torch.equal(mine, plain):
        raise InputError(f"adapter {adapter.name!r}: changes no logit of {base.name!r}; was it trained?")
    trained_on = adapter.base
    if trained_on and Path(trained_on).name != Path(base.name).name:
        log.warning("adapter %s was trained on %s, and is put on %s", adapter.name, trained_on, base.name)
