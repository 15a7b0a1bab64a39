"""What `transformers` is told beside a model's place, judged before its weights are read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from crosscode.data.harvest.language_models import LanguageModel, available_device
from crosscode.errors import InputError, at_field, first_line

_PLACED_BY_TRANSFORMERS = ("auto", "balanced", "balanced_low_0", "sequential")


def check_options(
    device_map: str | Mapping[str, Any] | None,
    attn_implementation: str | None,
    quantization: Mapping[str, Any] | None,
    trust_remote_code: bool,
    skeleton: LanguageModel | None = None,
) -> None:
    """Raise `InputError` for what no model could be loaded with here: devices that are not there, packages that are not
    installed; for attention that is code from the hub, unless that is trusted; and for one that the model of a `skeleton`
    does not have."""
    if attn_implementation is not None and "/" in attn_implementation and not trust_remote_code:
        raise InputError(
            f"attn_implementation = {attn_implementation!r}: would run code from the hub; name one that `transformers` "
            "has (sdpa, eager, ...), or set trust_remote_code if you trust it"
        )
    if attn_implementation is not None and skeleton is not None:
        _check_attention(skeleton, attn_implementation, trust_remote_code)
    if device_map is not None:
        _check_device_map(device_map)
    if quantization is not None:
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer

        config = quantization_config(quantization)
        if getattr(AUTO_QUANTIZER_MAPPING.get(str(quantization.get("quant_method"))), "requires_calibration", False):
            raise InputError(
                f"quantization = {dict(quantization)}: this method reads weights that were quantized with it before; "
                "name such a model, and leave quantization out (the model says how it is quantized)"
            )
        try:
            quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
            quantizer.validate_environment(device_map=device_map, weights_only=True)
        except Exception as error:
            raise InputError(f"quantization = {dict(quantization)}: {first_line(error)}") from error


def check_revision(path: str, revision: str | None) -> None:
    """Raise `InputError` for the revision of what lies on this machine, where it would be passed over."""
    if revision is not None and Path(path).expanduser().exists():
        raise InputError(f"revision = {revision!r}: {path!r} is on this machine, where it has none; leave it out")


def _check_attention(skeleton: LanguageModel, name: str, trust_remote_code: bool) -> None:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(
                skeleton.model.config, attn_implementation=name, trust_remote_code=trust_remote_code
            )
    except (ValueError, ImportError) as error:
        raise InputError(f"attn_implementation = {name!r}: {first_line(error)}") from error


def _check_device_map(device_map: str | Mapping[str, Any]) -> None:
    if find_spec("accelerate") is None:
        raise InputError(f"device_map = {device_map!r}: needs the package accelerate (pip install accelerate)")
    if not device_map:
        raise InputError(f"device_map = {device_map!r}: places nothing; name a device for each part, or auto")
    if isinstance(device_map, str) and device_map in _PLACED_BY_TRANSFORMERS:
        return
    with at_field(f"device_map = {device_map!r}"):
        for place in [device_map] if isinstance(device_map, str) else device_map.values():
            if place == "disk":
                raise InputError("weights that stay on disk are not read; name devices")
            available_device(f"cuda:{place}" if str(place).isdigit() else str(place))


def packed_bits(fields: Mapping[str, Any]) -> int:
    """Bits that a weight of a layer takes, at the least, with these fields of a quantisation config: 1 where they say nothing."""
    if fields.get("load_in_4bit") or fields.get("load_in_8bit"):
        return 4 if fields.get("load_in_4bit") else 8
    said = next((fields[name] for name in ("bits", "nbits", "w_bit", "weights") if fields.get(name)), "")
    digits = re.search(r"\d+$", str(said))
    return int(digits[0]) if digits else 1


def quantization_config(fields: Mapping[str, Any]) -> Any:
    """`transformers`' own, from its fields."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    in_bits = fields.get("load_in_4bit") or fields.get("load_in_8bit")
    if not in_bits and fields.get("quant_method", "bitsandbytes") == "bitsandbytes":
        raise InputError(
            f"quantization = {dict(fields)}: set load_in_4bit or load_in_8bit to true (bitsandbytes), or another quant_method"
        )
    try:
        return AutoQuantizationConfig.from_dict(dict(fields))
    except Exception as error:  # whatever the library of a method raises
        raise InputError(f"quantization = {dict(fields)}: {first_line(error)}") from error
