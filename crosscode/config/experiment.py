"""What a user can set, with meanings and defaults. No torch here.

Components (architecture, activation, init, loss terms, constraints, optimizer) are named by `type` and carry their own config in
their own file; they appear here unresolved. `crosscode.build.schema.experiment_class` gives the class in which they are
resolved, which is what the command line shows and checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from crosscode.config.data import HarvestConfig
from crosscode.config.registry import Component, ConfigModel, Printable
from crosscode.weight_files import MAX_SHARD_SIZE, n_bytes_of

DEFAULT_ARCHITECTURE = "model_hookpoint_acausal"


class CrosscoderConfig(ConfigModel):
    """The model that is trained: what all architectures share. Each has its own fields besides, in its own file."""

    model_config = ConfigDict(extra="allow")
    type: Any = DEFAULT_ARCHITECTURE
    """architecture; decides how harvested activations become input and target"""
    n_latents: Annotated[int, Field(ge=1, lt=2**40)] | None = None
    """number of latents; give this or expansion_factor"""
    expansion_factor: PositiveFloat | None = None
    """number of latents as a multiple of the width D"""
    activation: Component
    """activation function"""
    init: Component
    """initialisation"""
    use_encoder_bias: bool = True
    """whether the encoder has a bias"""
    use_decoder_bias: bool = True
    """whether the decoder has a bias"""
    linear_skip: bool = False
    """add a linear map from input to output (transcoders)"""
    prefixes: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """nested dictionaries that must reconstruct alone (objective.matryoshka), smallest first: each as a number of latents, or
    below 1 as a share of them; the whole dictionary is always one and is not named"""
    decoder_norm: Literal["sum", "joint"] | None = None
    """how decoder norms over crosscoding positions combine; null: sum, but joint for cross-layer transcoders"""

    @model_validator(mode="after")
    def _one_size(self) -> CrosscoderConfig:
        if (self.n_latents is None) == (self.expansion_factor is None):
            raise ValueError(
                f"n_latents = {self.n_latents} and expansion_factor = {self.expansion_factor}: give exactly one"
            )
        return self


class ResampleConfig(ConfigModel):
    """Dead latents begin anew at tokens that are reconstructed badly (Bricken et al. 2023)."""

    every: PositiveInt = 1000
    """steps between resamplings"""
    until: float = Field(default=0.5, gt=0, le=1)
    """share of the run after which there is none"""
    from_start: bool = False
    """before the first of them also at steps 10, 20, 40, 80, ..., of latents that were silent since the last of these"""
    dead_after_tokens: PositiveInt | None = None
    """a latent is dead when it has not been active for this many tokens; null: train.dead_after_tokens"""
    encoder_scale: PositiveFloat = 0.2
    """norm of a new encoder row over the mean norm of live ones; what selects the k largest may need more"""
    seed: int = 0
    """seed of the draws"""


class TrainConfig(ConfigModel):
    """The training loop."""

    n_tokens: PositiveInt
    """activations to train on"""
    batch_size: PositiveInt = 4096
    """activations of one optimizer step"""
    grad_accumulation: PositiveInt = 1
    """parts into which a batch is cut to save memory; the update is the same, but BatchTopK and AuxK, which must know
    of the whole batch, encode and decode each part once more (and BatchTopK waits for a GPU once a part, for the number of
    its latents); must divide batch_size"""
    optimizer: Component = Component(type="adam")
    """optimizer and its learning rate over the run"""
    clip_grad_norm: PositiveFloat | None = 1.0
    """largest gradient norm, in which linear thresholds do not count; null: no clipping"""
    dead_after_tokens: PositiveInt = 1_000_000
    """a latent counts as dead when it was not active for this many tokens, in figures and, unless objective.auxk has a
    number of its own, for AuxK"""
    resample: ResampleConfig | None = None
    """give dead latents new weights, every so many steps; null: never"""
    log_every: PositiveInt = 50
    """steps between rows of metrics.jsonl"""
    histogram_every: PositiveInt | None = None
    """steps between rows of histograms.jsonl (firing, decoder norms, thresholds, relative norms); null: none"""
    checkpoint_every: PositiveInt | None = None
    """steps between checkpoints; null: only at the end"""
    keep_last: PositiveInt = 2
    """how many of the newest checkpoints are kept"""
    keep_every: PositiveInt | None = None
    """checkpoints at multiples of this step are kept for ever; null: none is"""
    max_shard_size: str = MAX_SHARD_SIZE
    """largest file of saved weights, such as 500MB; more are several files beside an index. A tensor is not cut: one that is
    larger has a file of its own"""
    max_skipped_steps: NonNegativeInt = 0
    """steps with a loss or gradient that is not finite are left out; after more than this many training stops"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast with float32 weights; thresholds and statistics stay float32"""
    tf32: bool = False
    """let float32 matrix products round their factors (faster on recent GPUs)"""
    compile: bool = False
    """run forward and loss through torch.compile"""
    cuda_graph: bool | Literal["auto"] = False
    """on a CUDA device, record what a step launches and launch it as one, which helps small models; steps whose figures are
    logged, and what cannot be recorded, run as ever. auto: where it is faster, tried out when a run begins, whose own config
    then says it"""
    wandb_project: str | None = None
    """also log to this wandb project (needs the extra `wandb`)"""
    tensorboard: bool = False
    """also log to RUN/tensorboard (needs the extra `tensorboard`)"""

    @field_validator("optimizer", mode="before")
    @classmethod
    def _made_in_python(cls, optimizer: Any) -> Any:
        """`Adam(lr=1e-3)` is as good as its config, and fields without a type are Adam's."""
        if isinstance(optimizer, Mapping):
            return {"type": "adam", **optimizer}
        config = getattr(optimizer, "config", optimizer)
        return config.model_dump() if isinstance(config, BaseModel) and not isinstance(config, Component) else optimizer

    @field_validator("max_shard_size", mode="before")
    @classmethod
    def _is_a_size(cls, size: Any) -> str:
        n_bytes_of(size)
        return str(size)

    @model_validator(mode="after")
    def _whole_parts(self) -> TrainConfig:
        if self.batch_size % self.grad_accumulation:
            raise ValueError(
                f"grad_accumulation = {self.grad_accumulation}: must divide batch_size = {self.batch_size}"
            )
        if self.n_tokens < self.batch_size:
            raise ValueError(f"n_tokens = {self.n_tokens}: must be at least batch_size = {self.batch_size}")
        return self

    @property
    def n_steps(self) -> int:
        """Whole batches in `n_tokens`."""
        return self.n_tokens // self.batch_size


class EvaluationConfig(ConfigModel):
    """Held-out figures."""

    n_tokens: PositiveInt = 50_000
    """held-out activations; fewer if there are fewer"""
    every: PositiveInt | None = None
    """steps between evaluations during training; null: only at the end"""
    loss_recovered: Literal["never", "end", "always"] = "end"
    """when reconstructions are spliced into the language models: never, at the end, or at every evaluation"""
    loss_recovered_n_tokens: PositiveInt = 4096
    """held-out tokens for that; each output position costs two further passes through its language model"""


class ExperimentConfig(HarvestConfig):
    """One run: everything that decides its result."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """name of the run"""
    run_dir: Printable = "runs/{name}"
    """folder of the run"""
    overwrite: bool = False
    """replace a finished run; one that is not over is replaced only by `--overwrite` on the command
    line. What crosscode did not write stays, and the old run stays in RUN/.crosscode-old until the first checkpoint"""
    backend: Literal["auto", "triton", "triton:screened", "torch", "torch:screened", "reference"] = "auto"
    """which kernels: they change speed and memory, never results. auto: the fastest, tried out on a CPU when a run begins,
    whose own config then names it. `torch:screened`, `triton:screened`: where bfloat16 products are fast, TopK's
    encode in float32 computes all pre-activations in bfloat16 and only those in full that may be among the k largest,
    proven row by row"""
    sparse_below: float | None = Field(default=None, ge=0, le=1)
    """sparse products below this share of active latents of a ReLU or JumpReLU; null: tried out on a CPU, dense on a GPU, where
    a share keeps memory for so many and 0.005 is a beginning; batches with more are multiplied densely there"""
    crosscoder: CrosscoderConfig
    """the model that is trained"""
    objective: dict[str, dict[str, Any]] = Field(min_length=1)
    """loss terms by name"""
    constraints: dict[str, dict[str, Any]] = Field(default={})
    """what acts between backward and the optimizer, by name"""
    finetune_from: Printable | None = None
    """start from these weights: a run, a checkpoint or a saved model; they replace the initialisation"""
    train: TrainConfig
    """the training loop"""
    evaluation: EvaluationConfig = EvaluationConfig()
    """held-out figures"""

    @field_validator("crosscoder", mode="before")
    @classmethod
    def _typed(cls, crosscoder: Any) -> Any:
        return {"type": DEFAULT_ARCHITECTURE, **crosscoder} if isinstance(crosscoder, Mapping) else crosscoder

    @model_validator(mode="after")
    def _buffer_holds_a_batch(self) -> ExperimentConfig:
        capacity = self.data.shuffle_buffer_size
        if capacity and capacity < self.train.batch_size:
            raise ValueError(
                f"data.shuffle_buffer_size = {capacity}: must be 0 or at least train.batch_size = {self.train.batch_size}"
            )
        return self

    def run_path(self) -> Path:
        return Path(self.run_dir.replace("{name}", self.name))
