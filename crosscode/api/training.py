"""`crosscode.train`: from tensors, files or a config to a trained run."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosscode.api.arguments import (
    check_beside_activations,
    is_of_config,
    name_for,
    sorted_fields,
    train_signature,
    with_crosscoder,
)
from crosscode.errors import InputError

if TYPE_CHECKING:
    from crosscode.api.run import Run


def train(
    acts: Any = None,
    crosscoder: Any = None,
    *,
    run_dir: str | Path | None = None,
    names: Sequence[Any] | None = None,
    heldout: Any = None,
    tokens: Any = None,
    tokenizer: Any = None,
    callbacks: Sequence[Any] = (),
    loggers: Sequence[Any] = (),
    progress: bool = True,
    trust_remote_code: bool = False,
    **fields: Any,
) -> Run:
    """Train on activations of your own, or from a config as `crosscode train` does.

    ```python
    run = crosscode.train(acts, {"type": "sae", "n_latents": 4096, "activation": {"type": "topk", "k": 32}}, run_dir="runs/a")
    run.model, run.summary, run.evaluate(), run.report()
    crosscode.train("my.yaml", train={"batch_size": 8192})
    ```

    Args:
        acts: what to train on: activations of your own, or a config. Activations are unscaled rows of shape (D,), (P, D) or
            (M, P, D), for M models, P hookpoints, width D. They may be a tensor, a numpy array or memory map, a path
            (safetensors, npy, parquet, the folder of a store), an `ActivationCache`, a DataLoader, an iterator or any
            iterable of batches; or a list with one of these for each position. A file is read ahead and never is as a whole
            in memory. A config is its file, a run directory, or a recipe's name.
        crosscoder: the section `crosscoder` of a config, as a dictionary or config; or an initialised model, which is
            trained in place, on its device. Beside a config: fields to replace. What is not said follows from the
            activation: an initialisation, and the objective (`recon` and `auxk` for TopK, BatchTopK and GroupMax; `recon`
            and `l1` for ReLU; `recon`, `tanh` and `pre_act` for JumpReLU). Training takes one pass over the rows, but at
            least 1000 steps.
        run_dir: folder of the run; default `runs/run`.
        names: a name for each position, in the order (M, P), such as "base/resid"; what stands before the last "/" is
            the model.
        heldout: activations for evaluation, in any of the forms of `acts`. Default: the last 2 % of the rows
            (`data={"validation_fraction": ...}`). A stream has no end that is known: there it is the first rows. Up to
            `evaluation.n_tokens` of them are kept in the run directory.
        tokens: token id of every row, (N,) or (H, S) with H * S = N: for examples in the report and feature files. Not
            beside `heldout`.
        tokenizer: of `transformers`, or its name: shows the tokens as text.
        callbacks: see `crosscode.Callback`.
        loggers: see `crosscode.Logger`, beside those of the config.
        progress: show it.
        trust_remote_code: let language models run code of their own, where the config says so. This is asked for only where
            the config lies in a run, which somebody else may have made.
        fields: any field of `train` (n_tokens, batch_size, optimizer, ...), or of a whole config (name, seed, device,
            backend, data, objective, constraints, evaluation, finetune_from, overwrite, train; beside a config also
            language_models and hookpoints).

    Raises:
        InputError: one line that names the argument, its value and what would be right, before anything is written.
        Interrupted: Ctrl-C; the run is saved.
    """
    values = sorted_fields(fields, _OWN)
    given = model = None
    if is_of_config(acts, crosscoder):
        from crosscode.commands.parts.options import experiment_values

        beside = {"names": names, "heldout": heldout, "tokens": tokens, "tokenizer": tokenizer}
        for name, value in beside.items():
            if value is not None:
                raise InputError(f"{name}: is for activations of your own; a config says where its come from")
        values = with_crosscoder(({"run_dir": str(run_dir)} if run_dir is not None else {}) | values, crosscoder)
        typed_overwrite = "overwrite" in values
        values = experiment_values(str(acts), values, trust_remote_code)  # says what is wrong before torch is imported
    else:
        check_beside_activations(values)
        from crosscode.api.given import given_arrays, section_of, source_of, usual_values
        from crosscode.models import BaseCrosscoder

        given = given_arrays(acts, heldout, tokens, tokenizer)
        source = source_of(given, names)
        model = crosscoder if isinstance(crosscoder, BaseCrosscoder) else None
        if model is not None:
            values = {"device": str(model.device), "backend": model.backend.name, **values}
        values |= {**name_for(run_dir), "language_models": [], "hookpoints": []}
        values["crosscoder"] = section_of(crosscoder, source["names"], given.inputs[0].row_shape[-1])
        values = usual_values(values, given)
        values["data"] = {"source": source, **values["data"]}
        typed_overwrite, trust_remote_code = None, False
    from crosscode.api.run import Run
    from crosscode.build.experiment import open_experiment
    from crosscode.build.replacing import check_may_begin
    from crosscode.build.run import build_trainer
    from crosscode.build.schema import check_config
    from crosscode.commands.parts.libraries import quiet_libraries
    from crosscode.parallel.refusals import for_ranks
    from crosscode.runs.loggers import Logger
    from crosscode.trainers.callbacks import Callback, check_each

    config = check_config(values)
    typed_overwrite = config.overwrite if typed_overwrite is None else typed_overwrite
    check_each("callbacks", callbacks, Callback)
    check_each("loggers", loggers, Logger)
    config = for_ranks(config)
    check_may_begin(config, typed_overwrite)
    quiet_libraries()
    build_trainer(
        open_experiment(config, arrays=given),
        model=model,
        callbacks=callbacks,
        loggers=loggers,
        progress=progress,
        typed_overwrite=typed_overwrite,
    ).train()
    return Run(config.run_path(), trust_remote_code)


_OWN = tuple(inspect.signature(train).parameters)
train.__signature__ = train_signature(train)  # pyright: ignore[reportFunctionMemberAccess]
