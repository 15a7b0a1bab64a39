"""sparsify (EleutherAI): `cfg.json` and `sae.safetensors` (`encoder.weight [L, D]`, `W_dec [L, D]`, `W_skip [Do, Di]`).

An SAE subtracts `b_dec` from its input, a transcoder (`transcode`) does not. delphi reads this format, too.

Axes: D width · L latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from crosscode.config.registry import ConfigModel
from crosscode.files import write_json
from crosscode.interop.format import (
    FORMATS,
    Format,
    cannot,
    known,
    peek,
    read_object,
    read_tensors,
    several_parts,
    single,
    write_tensors,
)
from crosscode.interop.plain import SINGLE, PlainCoder, PlainPart

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


@FORMATS.register
class Sparsify(Format):
    """SAEs and transcoders with TopK or GroupMax."""

    class Config(ConfigModel):
        type: Literal["sparsify"] = "sparsify"

    index = CONFIG
    files = r"cfg\.json|sae\.safetensors"

    def refusal(self, coders: Sequence[PlainCoder], *, complete: bool = True) -> str | None:
        (coder,) = coders
        several = several_parts(coder)
        if several:
            return several
        if coder.part.kind not in ("topk", "groupmax"):
            return f"sparsify has topk and groupmax alone, not {coder.part.kind}; SAELens holds thresholds, or train with topk"
        if coder.d_in != coder.d_out:
            return f"sparsify has one width for input and output, not {coder.d_in} and {coder.d_out}; take SAELens"
        return None

    def write(self, coders: Sequence[PlainCoder], folder: Path) -> None:
        (coder,) = coders
        coder = coder.with_pre_bias(not coder.is_transcoder)
        part = coder.part
        W_enc_LD, W_dec_LD, b_dec_D, W_skip_DD = single(coder)
        tensors = {"encoder.weight": W_enc_LD, "encoder.bias": part.b_enc_L, "W_dec": W_dec_LD, "b_dec": b_dec_D}
        if W_skip_DD is not None:
            tensors["W_skip"] = W_skip_DD.T
        write_tensors(folder / WEIGHTS, tensors)
        config = {
            "activation": part.kind,
            "expansion_factor": max(1, part.n_latents // coder.d_in),
            "normalize_decoder": False,
            "num_latents": part.n_latents,
            "k": part.activation["k"],
            "multi_topk": False,
            "skip_connection": W_skip_DD is not None,
            "transcode": coder.is_transcoder,
            "d_in": coder.d_in,
        }
        write_json(folder / CONFIG, config)

    def recognises(self, path: Path) -> bool:
        return (path / WEIGHTS).is_file() and "k" in peek(path / CONFIG)

    def read(self, path: Path) -> list[PlainCoder]:
        config = read_object(path / CONFIG)
        kind = config.get("activation", "topk")
        if kind not in ("topk", "groupmax"):
            cannot(path, f"activation {kind!r} is none of sparsify's; read are topk and groupmax")
        tensors = read_tensors(path / WEIGHTS, "encoder.weight", "encoder.bias", "W_dec", "b_dec")
        skip, transcode = tensors.get("W_skip"), bool(config.get("transcode"))
        part = PlainPart(
            tensors["encoder.weight"],
            tensors["W_dec"],
            tensors["encoder.bias"],
            {"type": kind, "k": config["k"]},
            W_skip_XiDiXoDo=None if skip is None else skip.T,
        )
        metadata = known("transcoder" if transcode else "sae", None)
        return [PlainCoder(SINGLE, (part,), tensors["b_dec"], pre_bias=not transcode, metadata=metadata)]
