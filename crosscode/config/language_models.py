"""What a user can set of a language model. No torch here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from crosscode.config.registry import ConfigModel, Printable

DTypeName = Literal["float32", "bfloat16", "float16"]


class LanguageModelConfig(ConfigModel):
    """A language model whose activations are harvested."""

    path: Printable
    """hub name, local folder, GGUF file, an embedded model (`demo:base`, `demo:tuned`, `demo:planted`), or
    `package:NAME/FILE` for a file that an installed Python package ships. A path to an adapter stands for it on the base that
    it names"""
    adapter: Printable | None = None
    """adapter on it (LoRA and others of `peft`): a local folder or a hub name, OWNER/NAME or OWNER/NAME/SUBFOLDER"""
    adapter_revision: Printable | None = None
    """git revision of a hub adapter"""
    adapter_scale: float = Field(default=1.0, allow_inf_nan=False)
    """what LoRA adds is multiplied by it"""
    adapter_dtype: Literal["float32", "auto"] = "float32"
    """of the adapter's weights on a base in bfloat16 or float16: float32, as `peft` has them; auto: the base's (faster)"""
    name: Printable | None = None
    """short name in metrics and reports; null: the last part of the path, or of the adapter's"""
    revision: Printable | None = None
    """git revision of a hub model"""
    gguf_file: Printable | None = None
    """file name inside the folder `path`, for GGUF weights"""
    dtype: Literal["auto"] | DTypeName = "auto"
    """dtype of the weights and of the run; auto: the checkpoint's own. Activations and statistics stay float32"""
    device: Printable | None = None
    """device of this model; null: that of the crosscoder"""
    device_map: Printable | dict[str, int | str] | None = None
    """instead of device: places of the model's parts, as `transformers` takes them (auto: over all GPUs)"""
    attn_implementation: Printable | None = None
    """attention as `transformers` takes it (sdpa, eager, flash_attention_2, ...); null: what it prefers"""
    quantization: dict[str, Any] | None = None
    """fields of a quantisation config of `transformers`, such as {quant_method: bitsandbytes, load_in_4bit: true}"""
    trust_remote_code: bool = False
    """let a hub model run code of its own"""

    def short_name(self) -> str:
        return self.name or (self.adapter or self.path).rstrip("/").split("/")[-1].split(":")[-1].removesuffix(".gguf")

    @property
    def is_gguf(self) -> bool:
        """Whether one file holds its weights, configuration and tokenizer, and nothing can be read of it apart."""
        return self.gguf_file is not None or self.path.endswith(".gguf")

    @model_validator(mode="after")
    def _go_together(self) -> LanguageModelConfig:
        if self.adapter is None and self.adapter_revision is not None:
            raise ValueError(f"adapter_revision = {self.adapter_revision!r}: is given without adapter")
        if self.device is not None and self.device_map is not None:
            raise ValueError(f"device = {self.device!r}: device_map = {self.device_map!r} is given as well; give one")
        if self.adapter_scale == 0:
            raise ValueError("adapter_scale = 0.0: would be the base; leave adapter out")
        return self
