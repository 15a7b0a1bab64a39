"""What a user can set on the way from text to activations, with meanings and defaults. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from crosscode.config.arrays import ArraysSource
from crosscode.config.language_models import DTypeName, LanguageModelConfig
from crosscode.config.parallel import ParallelConfig
from crosscode.config.positions import PositionRules
from crosscode.config.registry import ConfigModel, Printable
from crosscode.config.sources import AnyText, Rollouts, Source, rollouts_in
from crosscode.config.stores import CacheConfig, StoreConfig

TemplateTokens = Literal["keep", "mask", "answers"]
SequenceLength = Annotated[int, Field(ge=2)]


class TextConfig(ConfigModel):
    """Which text, in sequences of which size."""

    source: Source
    """training text"""
    heldout: Source | None = None
    """text for evaluation; null: a share of `source` that training never sees"""
    validation_fraction: float = Field(default=0.02, gt=0, lt=1)
    """share of the documents kept for evaluation where `heldout` is null"""
    sequence_length: SequenceLength = 256
    """tokens of a sequence"""
    harvest_batch_size: PositiveInt = 16
    """sequences that pass through the language models at once"""


class TokenRules(ConfigModel):
    """How documents become sequences, and which positions may reach training."""

    shuffle: bool = True
    """read documents in a random order, another one each epoch"""
    epochs: PositiveInt | None = None
    """passes over the source; null: as many as training needs"""
    bos: Literal["sequence", "document", "none"] = "sequence"
    """where the beginning-of-sequence token goes"""
    separator: Literal["eos", "none"] = "eos"
    """what stands between documents of one sequence"""
    pack: bool = True
    """whether documents share sequences"""
    isolate_documents: bool = False
    """keep attention inside each document of a sequence"""
    keep_first_position: bool = False
    """train on position 0 as well (an attention sink: its norm outweighs all others)"""
    mask_special_tokens: bool = False
    """leave out activations at the tokenizer's special tokens"""
    mask_token_ids: list[NonNegativeInt] = Field(default=[])
    """leave out activations at these token ids"""
    template_tokens: TemplateTokens = "keep"
    """chats: whether activations at tokens that the chat template adds are used; answers: only those of what the assistant
    says (and none of plain text)"""
    positions: PositionRules | None = None
    """which positions of chats, and how many of a document; null: all that the other fields leave"""


class TokenPolicy(TokenRules):
    """All that decides the tokens and the mask, but for the documents and the tokenizer."""

    sequence_length: SequenceLength
    """tokens of a sequence"""
    batch_size: PositiveInt = 8
    """sequences of a batch; the last one of an epoch may hold fewer"""
    seed: int = 0
    """decides the order of the documents"""
    split: Literal["all", "train", "validation"] = "all"
    """a side of the validation split, which the content of a document alone decides"""
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    """share of the documents on the side of validation"""
    worker: tuple[NonNegativeInt, PositiveInt] = (0, 1)
    """(index, count): every count-th document alone is read, for several processes that share a data set"""
    n_workers: NonNegativeInt = 0
    """threads that tokenize ahead of the reader; 0: none. Batches are the same for any number"""

    @model_validator(mode="after")
    def _some_documents(self) -> TokenPolicy:
        if self.split == "validation" and self.validation_fraction == 0:
            raise ValueError("validation_fraction = 0.0: must be above 0 for a validation split")
        if self.worker[0] >= self.worker[1]:
            raise ValueError(f"worker = {self.worker}: must be (index, count) with 0 <= index < count")
        return self

    def keeps_first(self) -> bool:
        return self.keep_first_position or (self.positions is not None and self.positions.keep_first)

    def recorded(self) -> dict[str, Any]:
        """What stores and saved positions keep, as JSON. Masked ids are kept beside it, once the tokenizer has its say."""
        without = {"epochs", "n_workers", "mask_special_tokens", "mask_token_ids"}
        recorded = self.model_dump(mode="json", exclude=without)
        if self.positions is None:
            del recorded["positions"]  # as it was recorded before there were any
        elif not self.positions.keep_first:
            del recorded["positions"]["keep_first"]
        return recorded


AnySource = Annotated[AnyText | ArraysSource, Field(discriminator="type")]


class DataConfig(TokenRules, TextConfig):
    """From text to shuffled activations."""

    source: AnySource  # pyright: ignore[reportIncompatibleVariableOverride]
    """training text, or activations of your own"""
    cache: CacheConfig | None = None
    """write activations to a store while training, and read them back in later epochs and runs"""
    stores: list[StoreConfig] = Field(default=[])
    """read activations from these stores instead of harvesting: [FOLDER, ...] or [{path: FOLDER, weight: 2}, ...]. A
    store of something else than this config describes is refused; with a mixture each may hold a part of it"""
    join: list[Printable] = Field(default=[])
    """read these stores as one instead of harvesting: [FOLDER, FOLDER, ...], whose rows are of the same tokens and which hold
    the models one after another (`crosscode harvest --models`), or the hookpoints; stores of other tokens are refused"""
    store_read_block: PositiveInt | Literal["auto"] | None = "auto"
    """consecutive activations of a store that are read together; they end up apart, in one window of
    shuffle_buffer_size. auto: as many as 32 KiB hold, at most 16; of stores at a URL as many as 512 KiB hold, at most a
    256th of the window. null: as auto for a folder, as runs of earlier versions have it. A few hundred read a disk at its
    full speed; 1 shuffles without any such tie, slower"""
    token_workers: int = Field(default=0, ge=0, le=1024)
    """threads that tokenize ahead of the harvest; 0: none. Batches are the same for any number"""
    prefetch: int = Field(default=0, ge=0, le=1024)
    """harvests (or reads) that a thread may run ahead of training; changes no batch"""
    shuffle_buffer_size: NonNegativeInt | None = None
    """activations to draw batches from; 0: no shuffling; null: 65,536. Checkpoints hold the buffer. Stores are read
    through a window of this size (0: of 65,536) that no checkpoint holds"""
    scale: bool | Literal["own_width"] = True
    """scale each (model, hookpoint) to a mean norm of sqrt(D), D the largest width of all, so that each has the same part of
    the loss; own_width: to the root of its own width, so that wider ones have more; folded into the weights at the end"""
    n_tokens_for_norm_estimate: PositiveInt = 32_768
    """activations on which the scaling is estimated (training sees them too)"""
    activation_dtype: DTypeName = "float32"
    """dtype of harvested activations in the shuffle buffer"""
    max_norm_ratio: float | None = Field(default=None, gt=1, allow_inf_nan=False)
    """leave tokens out of training and of figures where an activation is longer than this times the median norm at its
    place (attention sinks may be 300 times as long), or not finite; null: none, and what is not finite is an error"""
    equal_models: Literal["stop", "train"] = "stop"
    """what is done where all language models have equal activations: say so and stop, or train all the same"""

    def reads_stores(self) -> bool:
        """Whether activations are not harvested but read."""
        return bool(self.stores or self.join)

    @model_validator(mode="after")
    def _one_way(self) -> DataConfig:
        if self.cache is not None and self.stores:
            raise ValueError(
                f"cache.path = {self.cache.path!r} is written and stores ({self.stores[0].path!r}, ...) are read "
                "instead of harvesting: give one of the two"
            )
        if self.join and (self.stores or self.cache is not None):
            raise ValueError(
                f"join ({self.join[0]!r}, ...): {'stores' if self.stores else 'cache'} is given as well: give one of them"
            )
        if len({store.weight is None for store in self.stores}) > 1:
            raise ValueError("stores: give a weight to each of them, or to none")
        return self


class HarvestConfig(ConfigModel):
    """Everything that decides which activations there are."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """seed of all that is random"""
    device: str = "auto"
    """device of the crosscoder, and of language models that name none: auto, cpu, cuda, cuda:1, mps"""
    language_models: list[LanguageModelConfig] = Field(default=[])
    """models to harvest; each reads the text in its own tokens"""
    hookpoints: list[str] = Field(default=[])
    """names of TransformerLens (blocks.5.hook_resid_post) or modules (model.layers.5.mlp)"""
    data: DataConfig
    """from text to activations"""
    parallel: ParallelConfig = ParallelConfig()
    """language models over processes"""

    @model_validator(mode="after")
    def _names_differ(self) -> HarvestConfig:
        names = [model.short_name() for model in self.language_models]
        if len(set(names)) != len(names):
            raise ValueError(f"language_models: two share the name {max(names, key=names.count)!r}; set their `name`")
        if len(set(self.hookpoints)) != len(self.hookpoints):
            raise ValueError(f"hookpoints: {max(self.hookpoints, key=self.hookpoints.count)!r} is named twice")
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _named(cls, values: Any, handler: Any) -> Any:
        """What is missing is said beside whatever else is wrong."""
        missing: list[InitErrorDetails] = []
        if isinstance(values, dict):
            data = values.get("data")
            source = data.get("source") if isinstance(data, dict) else getattr(data, "source", None)
            if not isinstance(source, ArraysSource) and not (
                isinstance(source, dict) and source.get("type") == "arrays"
            ):
                names = [name for name in ("language_models", "hookpoints") if name not in values]
                missing = [InitErrorDetails(type="missing", loc=(name,), input=values) for name in names]
        try:
            made = handler(values)
        except ValidationError as error:
            others = [
                one for one in error.errors() if not (missing and one["loc"] == () and one["type"] == "value_error")
            ]
            found = [
                InitErrorDetails(type=one["type"], loc=one["loc"], input=one["input"], ctx=one.get("ctx", {}))
                for one in others
            ]
            raise ValidationError.from_exception_data(cls.__name__, [*missing, *found]) from None
        if missing:
            raise ValidationError.from_exception_data(cls.__name__, missing)
        return made

    def rollouts(self) -> Iterator[tuple[str, Rollouts]]:
        """The texts that a language model writes first, each with its place."""
        return chain(*(rollouts_in(getattr(self.data, name), f"data.{name}") for name in ("source", "heldout")))

    @model_validator(mode="after")
    def _named_writers(self) -> HarvestConfig:
        """A model that is named stands in full, so that a part of the config means the same."""
        named = {model.short_name(): model for model in self.language_models}
        for field, rollouts in self.rollouts():
            if isinstance(rollouts.model, str):
                if rollouts.model not in named:
                    raise ValueError(
                        f"{field}.model = {rollouts.model!r}: must be one of {', '.join(named)}, or {{path: ...}}"
                    )
                object.__setattr__(rollouts, "model", named[rollouts.model])
        return self

    @model_validator(mode="after")
    def _harvested_or_given(self) -> HarvestConfig:
        given = isinstance(self.data.source, ArraysSource)
        for name in ("language_models", "hookpoints"):
            if given == bool(getattr(self, name)):
                what = "is not for data.source.type 'arrays'" if given else "must name at least one"
                raise ValueError(f"{name} = {getattr(self, name)}: {what}")
        return self

    def n_positions(self) -> tuple[int, int]:
        """(M, P)."""
        names_MP = self.position_names()
        return len(names_MP), len(names_MP[0])

    def position_names(self) -> list[list[str]]:
        """`[M][P]` names such as "base/blocks.2.hook_resid_post"."""
        if isinstance(self.data.source, ArraysSource):
            return self.data.source.names
        return [[f"{model.short_name()}/{hook}" for hook in self.hookpoints] for model in self.language_models]

    def token_policy(self, *, heldout: bool = False) -> TokenPolicy:
        """Of the text to train on, or of that for evaluation: once, in the order in which it is written."""
        data = self.data
        separate = data.heldout is not None
        rules = {name: getattr(data, name) for name in TokenRules.model_fields}
        if heldout:
            rules |= {"epochs": 1, "shuffle": False}
        return TokenPolicy(
            **rules,
            sequence_length=data.sequence_length,
            batch_size=data.harvest_batch_size,
            seed=self.seed,
            split="all" if separate else ("validation" if heldout else "train"),
            validation_fraction=0.0 if separate else data.validation_fraction,
            n_workers=data.token_workers,
        )
