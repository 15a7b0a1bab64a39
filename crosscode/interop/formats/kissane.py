"""The model-diffing crosscoder of Kissane et al.: `cfg.json` and `cc_weights.pt` (`W_enc [M, D, L]`, `W_dec [L, M, D]`).

Axes: M models · D width · L latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from crosscode.config.registry import ConfigModel
from crosscode.files import write_json
from crosscode.interop.format import FORMATS, Format, cannot, peek, read_object, read_tensors, write_tensors
from crosscode.interop.plain import CROSSCODER, PlainCoder, PlainPart

CONFIG, WEIGHTS = "cfg.json", "cc_weights.pt"


@FORMATS.register
class Kissane(Format):
    """ReLU crosscoders of two models at one hookpoint."""

    class Config(ConfigModel):
        type: Literal["kissane"] = "kissane"

    index = CONFIG
    files = r"cfg\.json|cc_weights\.pt"

    def refusal(self, coders: Sequence[PlainCoder], *, complete: bool = True) -> str | None:
        (coder,) = coders
        if coder.kind != CROSSCODER or tuple(coder.b_dec_XoDo.shape[:2]) != (2, 1):
            return "it holds crosscoders of two models at one hookpoint alone; take dictionary-learning for other crosscoders"
        if coder.part.kind != "relu":
            return f"it has ReLU alone, not {coder.part.kind}; dictionary-learning has BatchTopK, which a topk is converted to"
        if coder.widths.padded:
            return "its models have one width; export one model's part of it --to saelens by --position"
        if coder.has_skip:
            return "it has no linear skip; train without crosscoder.linear_skip"
        return None

    def write(self, coders: Sequence[PlainCoder], folder: Path) -> None:
        coder = coders[0].with_pre_bias(False)
        part = coder.part
        tensors = {
            "W_enc": part.W_enc_LXiDi[:, :, 0].permute(1, 2, 0),
            "W_dec": part.W_dec_LXoDo[:, :, 0],
            "b_enc": part.b_enc_L,
            "b_dec": coder.b_dec_XoDo[:, 0],
        }
        write_tensors(folder / WEIGHTS, tensors)
        hookpoint = coder.inputs[0][1] if coder.inputs else None
        config = {
            "d_in": coder.d_in,
            "dict_size": part.n_latents,
            "enc_dtype": "fp32",
            "seed": 0,
            "device": "cpu",
            "dec_init_norm": 0.08,
            "l1_coeff": 0.0,
            "model_name": coder.model_name,
            "hook_point": hookpoint,
        }
        write_json(folder / CONFIG, config)

    def recognises(self, path: Path) -> bool:
        return (path / WEIGHTS).is_file() and "dict_size" in peek(path / CONFIG)

    def read(self, path: Path) -> list[PlainCoder]:
        config = read_object(path / CONFIG)
        tensors = read_tensors(path / WEIGHTS, "W_enc", "W_dec", "b_enc", "b_dec")
        if tensors["W_enc"].ndim != 3:
            cannot(path, f"W_enc has {tensors['W_enc'].ndim} axes, not the three of (models, width, latents)")
        part = PlainPart(
            tensors["W_enc"].permute(2, 0, 1)[:, :, None],
            tensors["W_dec"][:, :, None],
            tensors["b_enc"],
            {"type": "relu"},
        )
        hookpoint = config.get("hook_point")
        metadata = {"architecture": CROSSCODER} | ({"hookpoints": [hookpoint]} if hookpoint else {})
        return [PlainCoder(CROSSCODER, (part,), tensors["b_dec"][:, None], metadata=metadata)]
