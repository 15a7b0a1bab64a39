"""Config -> objects. The only file that knows both sides.

Axes: B tokens · M models · P hookpoints · D width · H sequences of a harvest · S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from crosscode_kernels import Backend, BackendName, resolve_backend
from crosscode_kernels.backend import resolve
from torch import Tensor

from crosscode.build.arrays import GivenArrays, open_arrays
from crosscode.build.data import Activations, available_device, build_rows, build_token_loader, open_activations
from crosscode.build.foresight import check_language_models, check_memory
from crosscode.build.heldout import AnyExperiment, HeldoutBatch
from crosscode.build.schema import given_components
from crosscode.config.arrays import ArraysSource
from crosscode.config.experiment import ExperimentConfig
from crosscode.data.harvest.language_models import LanguageModel
from crosscode.data.rows import RowSource
from crosscode.errors import InputError, in_section
from crosscode.evaluation.heldout import EvaluationResult
from crosscode.evaluation.loss_recovered import measure_loss_recovered
from crosscode.evaluation.replacement_model import measure_replacement_model
from crosscode.groups import Groupings
from crosscode.models import ACTIVATIONS, ARCHITECTURES, INITIALIZATIONS, BaseCrosscoder
from crosscode.models.architecture import ArchitectureConfig, split_for
from crosscode.objectives import Objective, objective_from
from crosscode.parallel import joined
from crosscode.parallel.harvest import alone
from crosscode.parallel.teams import Teams
from crosscode.trainers.constraints import CONSTRAINTS, Constraint, constraints_for
from crosscode.trainers.graphs import check_device
from crosscode.trainers.optimizers import OPTIMIZERS
from crosscode.trainers.warm_start import find_model
from crosscode.widths import Widths

# ---- parts of a run


def build_model(config: ExperimentConfig, width: int, widths_MP: Sequence[Sequence[int]] = ()) -> BaseCrosscoder:
    """An uninitialised model on the default device, for activations of one width, or of `widths_MP` padded to it."""
    cc = cast(ArchitectureConfig, config.crosscoder)
    n_latents = cc.n_latents or int((cc.expansion_factor or 0) * width)
    model_class = ARCHITECTURES[cc.type]
    with in_section("crosscoder", type(cc).model_fields):
        return model_class(
            **model_class.dims_for(*config.n_positions(), width),
            **Widths.of(widths_MP, config.n_positions(), width).as_option(),
            n_latents=n_latents,
            activation_fn=ACTIVATIONS.build(cc.activation, n_latents=n_latents),
            backend=backend_of(config),
            **cc.options(n_latents),
        )


def backend_of(config: ExperimentConfig) -> Backend:
    """The backend with the options that the optimizer asks of it."""
    wanted = Backend.parse(config.backend)
    if config.sparse_below is not None:
        wanted = replace(wanted, sparse_below=config.sparse_below, capacity=config.sparse_below)
    plan = OPTIMIZERS.build(config.train.optimizer)
    if plan.fused:
        is_triton = wanted.name == "triton" or (
            wanted.name == "auto" and resolve(wanted, available_device(config.device)).name == "triton"
        )
        if plan.fused is True and not is_triton:
            raise InputError(f"train.optimizer.fused = True: needs the triton backend, got {config.backend!r}")
        if is_triton:
            return replace(wanted, name="triton", options=(*wanted.options, "deferred"))
    if plan.row_sparse is not True:
        return wanted
    if wanted.name in ("triton", "reference"):
        raise InputError(
            "train.optimizer.row_sparse = True: needs backend 'torch', 'torch:screened' or 'auto', or 'triton' with "
            f"train.optimizer.fused = True, got {config.backend!r}"
        )
    return replace(wanted, name="torch", options=tuple(dict.fromkeys((*wanted.options, "rows"))))


def build_objective(config: ExperimentConfig) -> Objective:
    return objective_from(given_components(config.objective))


def build_constraints(config: ExperimentConfig, model: BaseCrosscoder) -> list[Constraint]:
    """The configured constraints and those that the model implies, in the order in which they act."""
    configured = given_components(config.constraints).values()
    constraints = constraints_for(model, [CONSTRAINTS.build(constraint) for constraint in configured])
    dense = [constraint for constraint in constraints if not constraint.takes_row_sparse]
    if dense and "rows" in model.backend.options:
        raise InputError(
            f"train.optimizer.row_sparse = True: {type(dense[0]).__name__} needs the whole gradient; leave it False"
        )
    return constraints


# ---- a whole run

_OF_ADAPTER = ("adapter", "adapter_revision", "adapter_scale", "adapter_dtype")


@dataclass(frozen=True, kw_only=True)
class Experiment(Activations, AnyExperiment):
    """On text, through language models."""

    config: ExperimentConfig

    @property
    def dims(self) -> tuple[int, int, int]:
        return self.harvester.dims

    @property
    def widths_MP(self) -> Widths:
        return self.harvester.widths_MP

    @property
    def device(self) -> torch.device:
        return self.harvester.device

    def all_rows(self) -> RowSource:
        return build_rows(self)

    @property
    def reads_alike(self) -> bool:
        data = self.config.data
        return alone(self.harvester) is not self.harvester and data.cache is None and not data.reads_stores()

    def language_model_facts(self) -> list[dict[str, Any]]:
        return [
            {
                "path": lm.path,
                "name": lm.short_name(),
                "revision": lm.revision,
                **({} if lm.adapter is None else lm.model_dump(include=set(_OF_ADAPTER))),
                "fingerprint": loaded.fingerprint(),
                **loaded.facts(),
            }
            for lm, loaded in zip(self.config.language_models, self.harvester.models, strict=True)
        ]

    def all_heldout(self) -> Iterator[HeldoutBatch]:
        for batch in build_token_loader(self, heldout=True):
            acts_HSMPD = self.harvester.harvest(*batch.inputs).float()
            group_HSG = None if batch.labels is None else batch.labels.groups_T2()
            apart = (batch.n_apart, batch.n_apart + int(batch.mask_HS.sum())) if batch.others else (0, 0)
            yield HeldoutBatch(batch.tokens_HS, batch.mask_HS, acts_HSMPD, group_HSG, batch.others, apart)

    def groupings(self) -> Groupings:
        return build_token_loader(self, heldout=True).groupings

    def n_evaluated(self, n_tokens: int | None = None) -> int:
        settings = self.config.evaluation
        spliced = 0 if settings.loss_recovered == "never" else settings.loss_recovered_n_tokens
        return super().n_evaluated(n_tokens) + 2 * spliced

    def evaluate(
        self,
        model: BaseCrosscoder,
        scaling_MP: Tensor | None = None,
        n_tokens: int | None = None,
        through: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> EvaluationResult:
        """Reconstruction, and what it costs to splice it into the language models."""
        settings = self.config.evaluation
        result = super().evaluate(model, scaling_MP, n_tokens, through)
        if settings.loss_recovered == "never" or (settings.loss_recovered == "end" and scaling_MP is not None):
            return result
        found = measure_loss_recovered(
            model,
            self.harvester,
            through(build_token_loader(self, heldout=True)),
            self.split,
            self.config.position_names(),
            scaling_MP,
            settings.loss_recovered_n_tokens,
            self.norm_limit(),
            self.groupings(),
        )
        if (teams := Teams.of(self.config)) is not None and teams.apart:
            found = {name: one for of_rank in teams.group.objects_of_all(found) for name, one in of_rank.items()}
        layered = None
        if scaling_MP is None:
            layered = measure_replacement_model(
                model,
                self.harvester,
                through(build_token_loader(self, heldout=True)),
                self.split,
                settings.loss_recovered_n_tokens,
                self.norm_limit(),
                self.groupings(),
            )
        return replace(result, loss_recovered=found, replacement_model=layered)


def open_experiment(
    config: ExperimentConfig,
    models: Sequence[LanguageModel] | None = None,
    *,
    arrays: GivenArrays | None = None,
    to_train: bool = True,
) -> AnyExperiment:
    """Check what can be checked without data, then load the language models, or open the arrays.

    `models`: in-memory models (`wrap_language_model`) in place of those that the config names, whose `path` is then
    only a name. `arrays`: in place of files that the config names. `to_train=False` asks for no training data: stores
    and arrays of activations need not be there.
    """
    split = split_for(config.crosscoder.type)
    split.check(*config.n_positions())
    joined(config.parallel)  # which says what device this one of several processes has
    device = available_device(config.device)
    if config.finetune_from is not None:
        find_model(config.finetune_from)
    if to_train:
        check_device(config.train, device)
    if config.backend != "auto":
        check_backend(config.backend, device)
    if config.crosscoder.n_latents is not None:
        check_parts(config)
    if isinstance(config.data.source, ArraysSource):
        return open_arrays(config, split, arrays, to_train=to_train)
    foreseen = None if models is not None else check_language_models(config)
    if foreseen is not None:
        check_parts(config, foreseen)
        if to_train:
            check_fits(config, foreseen.widest, device)
    opened = open_activations(config, models, to_train=to_train, batch_size=config.train.batch_size)
    if (found := opened["harvester"].widths_MP) != foreseen:
        check_parts(config, found)
        if to_train:
            check_fits(config, found.widest, device)
    return Experiment(config=config, split=split, **opened)


def check_backend(name: BackendName, device: torch.device) -> None:
    """An explicit backend works here, or `InputError` with the reason."""
    try:
        resolve_backend(name, device, torch.float32)
    except ValueError as error:
        raise InputError(str(error)) from error


def check_parts(config: ExperimentConfig, widths_MP: Widths | None = None) -> None:
    """Build everything that needs no language model, to find contradictions early. On the meta device that costs
    nothing; without widths it finds all that do not depend on them."""
    if widths_MP is not None:
        split_for(config.crosscoder.type).check_widths(config.position_names(), widths_MP)
    with torch.device("meta"):
        model = build_model(config, 1) if widths_MP is None else build_model(config, widths_MP.widest, widths_MP)
        model.check_init(INITIALIZATIONS.build(config.crosscoder.init))
        build_objective(config).check_model(model)
        build_constraints(config, model)


def check_fits(config: ExperimentConfig, width: int, device: torch.device) -> None:
    """Raise `InputError` where the model, its optimizer or the shuffle buffer cannot fit into memory."""
    with torch.device("meta"):
        check_memory(config, build_model(config, width), width, device)
