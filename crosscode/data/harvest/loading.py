"""Language models from a hub name, a local folder or a GGUF file, with or without an adapter."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from crosscode.data.harvest.adapters import Adapter, apply_adapter, check_no_adapter, find_adapter
from crosscode.data.harvest.language_models import DTYPES, LanguageModel, available_device, freeze, ranks_answer
from crosscode.data.harvest.loading_options import check_options, check_revision, quantization_config
from crosscode.data.harvest.tensor_parallel import distributed_config
from crosscode.data.hub import look_for_hub
from crosscode.data.text.tokenizers import load_tokenizer
from crosscode.errors import InputError, RankLost, first_line

log = logging.getLogger("crosscode")


def load_language_model(
    name_or_path: str,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
    quantization: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    adapter: str | None = None,
    adapter_revision: str | None = None,
    adapter_scale: float = 1.0,
    adapter_dtype: str = "float32",
    n_ranks: int = 1,
    loaded: dict[Any, LanguageModel] | None = None,
) -> LanguageModel:
    """Load a model and its tokenizer, if it has one, with `transformers`, and an adapter on it with `peft`.

    Args:
        name_or_path: a hub name, a folder, or a `.gguf` file (the same as its folder plus `gguf_file`). One that holds an
            adapter alone stands for that adapter on the base that it names.
        revision: git revision of a hub model.
        trust_remote_code: let a hub model run code of its own.
        dtype: of the weights and of the run: "float32", "bfloat16", "float16", or "auto", the checkpoint's own.
        device_map: places of its parts, as `transformers` takes them ("auto": over all GPUs); instead of `device`.
        attn_implementation: as `transformers` takes it; None: what it prefers.
        quantization: fields of one of `transformers`' quantisation configs, `quant_method` among them.
        adapter: folder or hub name of an adapter, `OWNER/NAME/SUBFOLDER` for one in a folder of its repository.
        adapter_revision: git revision of a hub adapter.
        adapter_scale: what LoRA adds is multiplied by it.
        adapter_dtype: of the adapter on a base in half precision: "float32", as `peft` has it, or "auto", the base's.
        n_ranks: so many consecutive ranks, which load it together, hold it together.
        loaded: models without adapter that are there already, and to which this one's base is added: weights of a base
            that several models have are held once.

    Raises:
        InputError: the folder or file is missing, the dtype is unknown or the hub has no such model; as `apply_adapter`.
    """
    if dtype not in ("auto", *DTYPES):
        raise InputError(f"dtype: {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    if adapter_dtype not in ("float32", "auto"):
        raise InputError(f"adapter_dtype: {adapter_dtype!r} is not one of float32, auto")
    check_options(device_map, attn_implementation, quantization, trust_remote_code)
    on_base = adapter_of(name_or_path, revision, gguf_file, adapter, adapter_revision)
    if on_base is None and adapter_scale != 1:
        raise InputError(f"adapter_scale = {adapter_scale}: {name_or_path!r} has no adapter")
    if on_base is not None and adapter is None:
        name_or_path, revision = _base_of(on_base), on_base.base_revision
    source, gguf_file = _find_source(name_or_path, gguf_file)
    with _one_line_errors(name_or_path, revision):
        place = available_device(device)
    options = {
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "gguf_file": gguf_file,
        "dtype": dtype,
        "device_map": device_map,
        "attn_implementation": attn_implementation,
        "n_ranks": n_ranks,
    }
    key = json.dumps([source, str(place), options, quantization], sort_keys=True)
    loaded = {} if loaded is None else loaded
    if key not in loaded:
        name = f"{source}/{gguf_file}" if gguf_file is not None else name_or_path
        with _one_line_errors(name_or_path, revision, but=(RankLost,)), ranks_answer(n_ranks):
            check_no_adapter(source, revision)
            loaded[key] = freeze(*_load(source, place, options, quantization), name, revision, n_ranks=n_ranks)
            log.info("language model %s runs in %s", name, str(loaded[key].dtype).removeprefix("torch."))
    if on_base is None:
        return loaded[key]
    with _one_line_errors(f"{name_or_path} + {on_base.name}", on_base.revision, but=(InputError,)):
        return apply_adapter(loaded[key], on_base, adapter_scale, adapter_dtype)


def _load(
    source: str, place: torch.device, options: Mapping[str, Any], quantization: Mapping[str, Any] | None
) -> tuple[Any, Any]:
    """Model and tokenizer."""
    from transformers import AutoModelForCausalLM

    given = {name: value for name, value in options.items() if value is not None or name == "revision"}
    if (n_ranks := int(given.pop("n_ranks") or 1)) > 1:
        given["distributed_config"] = distributed_config(n_ranks)
    of_files = ("revision", "trust_remote_code", "gguf_file")
    tokenizer = load_tokenizer(source, {name: value for name, value in given.items() if name in of_files})
    given["dtype"] = DTYPES.get(options["dtype"], "auto")
    if "gguf_file" in given:
        given |= _dense_gguf_options()
    if quantization is not None:
        given["quantization_config"] = quantization_config(quantization)
        given.setdefault("device_map", {"": str(place)})  # packed weights cannot be moved afterwards
    found: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **given)
    model, info = found
    _check_nothing_is_missing(model, info["missing_keys"])
    if "device_map" not in given:
        return model.to(place), tokenizer
    n_off = sum(weight.is_meta for weight in model.parameters())
    if n_off:
        raise InputError(f"device_map = {given['device_map']!r}: {n_off} weights found no place on a device")
    return model, tokenizer


def adapter_of(
    path: str, revision: str | None, gguf_file: str | None, adapter: str | None, adapter_revision: str | None
) -> Adapter | None:
    """The adapter that is asked for, or that stands at `path` alone."""
    check_revision(path, revision)
    if adapter is not None:
        with _one_line_errors(adapter, adapter_revision, but=(InputError,), what="adapter"):
            is_folder = Path(adapter).expanduser().is_dir()
            if is_folder and adapter_revision is not None:
                raise InputError(f"adapter_revision = {adapter_revision!r}: {adapter!r} is a folder, which has none")
            is_path = adapter.startswith((".", "~", os.sep)) and not is_folder
            found = None if is_path else find_adapter(adapter, adapter_revision)
        if found is None:
            at = "" if adapter_revision is None else f" at revision {adapter_revision!r}"
            raise InputError(f"adapter = {adapter!r}: no folder or hub repository with an adapter_config.json{at}")
        return found
    folder = Path(path).expanduser()
    if gguf_file is not None or folder.suffix == ".gguf":
        return None
    if folder.is_dir():
        return None if (folder / "config.json").is_file() else find_adapter(path, None)
    if _looks_like_a_path(path):
        with suppress(OSError, InputError):  # no such repository, or no hub to ask
            return None if path.startswith((".", "~", os.sep)) else find_adapter(path.rstrip("/"), revision)
        return None
    from transformers.utils.hub import cached_file
    from transformers.utils.peft_utils import find_adapter_config_file

    look_for_hub()
    with _one_line_errors(path, revision):
        is_alone = find_adapter_config_file(path, revision=revision) and not cached_file(
            path, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False
        )
        return find_adapter(path, revision) if is_alone else None


def _base_of(adapter: Adapter) -> str:
    if not adapter.base:
        raise InputError(f"adapter {adapter.name!r}: names no base; give it as path, and this as adapter")
    return adapter.base


def _check_nothing_is_missing(model: Any, missing: Collection[str]) -> None:
    """`transformers` fills weights that a checkpoint lacks with random numbers, and says so in a warning alone."""
    if missing:
        n_all = sum(1 for _ in model.parameters())
        raise InputError(f"{len(missing)} of its {n_all} weights are not in the files ({min(missing)}, ...)")


def files_id(
    name_or_path: str,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    adapter: str | None = None,
    adapter_revision: str | None = None,
) -> str:
    """16 hex digits of what a model would be loaded from, with an adapter or without: of files by their bytes, of a hub
    repository by its commit. Errors as `load_language_model` has them."""
    from transformers.utils.hub import cached_file

    on_base = adapter_of(name_or_path, revision, gguf_file, adapter, adapter_revision)
    digest = hashlib.sha256()
    if on_base is not None:
        _add_files(digest, on_base.folder, None)
        if adapter is None:
            name_or_path, revision = _base_of(on_base), on_base.base_revision
    source, gguf_file = _find_source(name_or_path, gguf_file)
    if Path(source).is_dir():
        _add_files(digest, Path(source), gguf_file)
    else:
        with _one_line_errors(name_or_path, revision):
            found = cached_file(source, gguf_file or "config.json", revision=revision)
        digest.update(f"{source}@{Path(str(found)).parent.name}".encode())
    return digest.hexdigest()[:16]


def _add_files(digest: Any, folder: Path, only: str | None) -> None:
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix != ".md" and only in (None, file.name):
            with file.open("rb") as stream:
                digest.update(f"{file.name}|{hashlib.file_digest(stream, 'sha256').hexdigest()}|".encode())


def load_skeleton(
    name_or_path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    adapter: str | None = None,
    adapter_revision: str | None = None,
    with_tokenizer: bool = False,
) -> LanguageModel:
    """The modules of a model without its weights, from its configuration alone, and without a tokenizer unless that is asked
    for; of an adapter, those of its base.

    Enough to check hookpoints before anything expensive is loaded. Not for GGUF files.
    """
    on_base = adapter_of(name_or_path, revision, None, adapter, adapter_revision)
    if on_base is not None and adapter is None:
        name_or_path, revision = _base_of(on_base), on_base.base_revision
    source, gguf_file = _find_source(name_or_path, None)
    if gguf_file is not None:
        raise InputError(f"language model {name_or_path!r}: a GGUF file has no configuration apart from its weights")

    from transformers import AutoConfig, AutoModelForCausalLM

    with _one_line_errors(name_or_path, revision), torch.device("meta"):
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    tokenizer = None
    if with_tokenizer:
        with _one_line_errors(name_or_path, revision):
            own = on_base and load_tokenizer(str(on_base.folder), {"revision": None})
            rules = {"revision": revision, "trust_remote_code": trust_remote_code}
            tokenizer = own or load_tokenizer(source, rules)
    return freeze(model, tokenizer, name_or_path, revision)


def _find_source(name_or_path: str, gguf_file: str | None) -> tuple[str, str | None]:
    """What `transformers` is to load, and the GGUF file in it; a missing folder or file is refused here."""
    path = Path(name_or_path).expanduser()
    if path.suffix == ".gguf" and gguf_file is None:
        name_or_path, gguf_file = str(path.parent), path.name
        path = path.parent
    if not path.is_dir():
        if _looks_like_a_path(name_or_path):
            raise InputError(f"language model {name_or_path!r}: no such folder")
        look_for_hub()
        return name_or_path, gguf_file
    if gguf_file is not None and not (path / gguf_file).is_file():
        raise InputError(f"gguf_file: {gguf_file!r} is not in folder {str(path)!r}")
    if gguf_file is None and not (path / "config.json").is_file():
        raise InputError(f"language model {name_or_path!r}: the folder holds no config.json")
    return str(path), gguf_file


@contextmanager
def _one_line_errors(
    name_or_path: str,
    revision: str | None,
    *,
    but: tuple[type[Exception], ...] = (),
    what: str = "language model",
) -> Iterator[None]:
    try:
        yield
    except but:
        raise
    except Exception as error:  # of any library, and of code that comes with a model
        reason = first_line(error)
        if "ignore_mismatched_sizes" in reason:
            reason = "its files hold weights of other shapes than its config.json describes"
        raise InputError(f"{what} {name_or_path!r} (revision {revision}) cannot be loaded: {reason}") from error


def _dense_gguf_options() -> dict[str, Any]:
    """Unpack quantised weights once: packed ones would be unpacked again in every forward pass of a harvest.

    Versions of `transformers` without the option always unpack.
    """
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _looks_like_a_path(name: str) -> bool:
    """Hub names are `name` or `owner/name`; anything else that is not there is a missing folder."""
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or name.endswith(("/", ".gguf"))
