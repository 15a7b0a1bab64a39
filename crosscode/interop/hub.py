"""Models on the Hugging Face hub: a repository holds one saved model, its config, figures, report and card."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from crosscode.checksums import CHECKSUMS_FILE
from crosscode.config.nested import flatten
from crosscode.config.reading import dump_yaml, load_yaml
from crosscode.data.hub import look_for_hub
from crosscode.errors import InputError, first_line
from crosscode.files import check_can_be_made, check_is_no_link, check_may_be_filled, new_folder, write_text
from crosscode.interop.format import ABOUT, FORMATS
from crosscode.models.checkpoint import CONFIG_FILE, check_undamaged, read_config
from crosscode.runs.run_files import CONFIG_FILE as RUN_CONFIG
from crosscode.runs.run_files import write_marker
from crosscode.stored import Evaluation, Summary, read_json
from crosscode.weight_files import INDEX_FILE, WEIGHTS_FILE, weight_files

log = logging.getLogger("crosscode")

CARD = "README.md"
_OF_RUN = (RUN_CONFIG, "summary.json", "evaluation.json", "report.html")
_PULLED = (CONFIG_FILE, CHECKSUMS_FILE, CARD, *_OF_RUN)
_WEIGHTS = (WEIGHTS_FILE, INDEX_FILE, "model-*-of-*.safetensors")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repo(name: str) -> bool:
    """Whether this may be a repository, USER/NAME: it has that form, and there is no folder of that first name here."""
    path = Path(name)
    return _NAME.fullmatch(name) is not None and not path.exists() and not path.parent.exists()


def hub_names(paths: Iterable[str]) -> list[str]:
    """Those that are repositories, for cards."""
    return [path for path in paths if is_repo(path)]


def fetch(name: str, revision: str | None = None) -> Path:
    """The saved model of a repository, in the hub's own cache.

    Raises:
        InputError: no such repository, no way to it, or no model of ours in it.
    """
    _check_name(name)
    from huggingface_hub import snapshot_download

    with _hub(name):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*_PULLED, *_WEIGHTS]))
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"hub {name!r}: no saved model there (no {CONFIG_FILE} at its top)")
    return folder


def pull(name: str, out: Path, revision: str | None = None) -> Path:
    """What is in a repository as the new folder `out`: a run directory where it holds a run's config, else a saved model."""
    check_may_be_filled(out, "out")
    check_is_no_link(out)
    check_can_be_made(out, "out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"out = {str(out)!r}: is there already; name a new folder")
    return _copied(fetch(name, revision), out)


def _copied(found: Path, out: Path) -> Path:
    check_undamaged(found)
    is_run = (found / RUN_CONFIG).is_file()
    with new_folder(out, RUN_CONFIG if is_run else CONFIG_FILE) as folder:
        if is_run:
            (folder / "final").mkdir()
            write_marker(folder, "run", made_by="pull")
        of_model = (CONFIG_FILE, *weight_files(found), CHECKSUMS_FILE)
        for file in dict.fromkeys((*_PULLED, *of_model)):
            if (found / file).is_file():
                inner = "final" if is_run and file in of_model else ""
                shutil.copyfile(found / file, folder / inner / file)
    return out


def local(source: str | Path) -> Path:
    """The path itself, or of a repository USER/NAME what `pull` makes of it: beside the hub's own cache, once for each
    commit."""
    if not is_repo(str(source)):
        return Path(source)
    found = fetch(str(source))
    from huggingface_hub import constants

    out = Path(constants.HF_HOME) / "crosscode" / source / found.name
    log.info("%s lies in %s", source, out)
    return out if out.is_dir() else _copied(found, out)


def foreign(source: Path) -> Path:
    """The path itself, or of a repository USER/NAME the files of other libraries that lie at its top, in the hub's own cache.

    Raises:
        InputError: none lie there.
    """
    if not is_repo(str(source)):
        return source
    from huggingface_hub import HfApi, snapshot_download

    name = str(source)
    known = "|".join([r"params\.(npz|safetensors)", re.escape(ABOUT), *(FORMATS[each].files for each in FORMATS)])
    with _hub(name):
        files = [file for file in HfApi().list_repo_files(name) if re.fullmatch(known, file)]
        if not files:
            raise InputError(
                f"hub {name!r}: no files of those libraries at its top; `hf download` the folder that you want"
            )
        return Path(snapshot_download(name, allow_patterns=files))


def contents(
    model_folder: Path, run: Path | None, name: str, licence: str | None = None, features: Path | None = None
) -> dict[str, Path | str]:
    """What goes into a repository: by its name there a file, or the text of one. Checkpoints, metrics, logs and whatever else
    lies in a run stay where they are.

    Args:
        run: the run directory of the model, if it is of one.
        features: a folder that `crosscode features --to circuit-tracer` wrote.
    """
    _check_name(name)
    check_undamaged(model_folder)
    found: dict[str, Path | str] = {file: model_folder / file for file in (CONFIG_FILE, *weight_files(model_folder))}
    if (model_folder / CHECKSUMS_FILE).is_file():
        found[CHECKSUMS_FILE] = model_folder / CHECKSUMS_FILE
    for file in _OF_RUN if run is not None else ():
        assert run is not None
        check_is_no_link(run / file)
        if (run / file).is_file():
            found[file] = run / file
    config = _for_others(run / RUN_CONFIG) if run is not None and RUN_CONFIG in found else None
    if config is not None:
        found[RUN_CONFIG] = config
    for file in [] if features is None else sorted((features / "features").iterdir()):
        check_is_no_link(file)
        found[f"features/{file.name}"] = file
    return {**found, CARD: card(model_folder, run, name, licence, config)}


def _for_others(file: Path) -> str:
    """A run's config without where it lay. Other paths of this machine stay, and are said."""
    values = load_yaml(file.read_text(encoding="utf-8"), str(file))
    values = {name: value for name, value in values.items() if name != "run_dir"} if isinstance(values, dict) else {}
    texts = (
        (field, each) for field, value in flatten(values) for each in (value if isinstance(value, list) else [value])
    )
    here = [
        f"{field} = {each!r}"
        for field, each in texts
        if isinstance(each, str) and Path(each).expanduser().is_absolute()
    ]
    if here:
        log.warning("push: %s says where things lie on this machine: %s", file.name, ", ".join(here))
    return dump_yaml(values)


def _check_name(name: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise InputError(f"{name!r}: is no name of a repository; it is USER/NAME")


def push(
    name: str,
    files: Mapping[str, Path | str],
    *,
    private: bool = False,
    kind: str = "model",
) -> str:
    """Make the repository, if there is none, and upload the files in one commit; returns its address.

    Args:
        kind: "model" or "dataset".

    Raises:
        InputError: the hub refuses, or there is no way to it.
    """
    _check_name(name)
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as root, _hub(name):
        for file, content in files.items():
            if isinstance(content, str):
                write_text(Path(root) / file, content)
            else:
                (Path(root) / file).parent.mkdir(parents=True, exist_ok=True)
                (Path(root) / file).symlink_to(content.resolve())
        api = HfApi()
        address = api.create_repo(name, private=private, exist_ok=True, repo_type=kind)
        api.upload_folder(repo_id=name, folder_path=root, commit_message=f"Upload a {kind}", repo_type=kind)
    return str(address)


class _hub:
    """Within the block what goes wrong with the hub becomes one line."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        look_for_hub()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from httpx import HTTPError
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

        if isinstance(error, (HTTPError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled)):
            raise InputError(f"hub {self.name!r}: {look_for_hub() or first_line(error)}") from error


# ---- the card


def card(model_folder: Path, run: Path | None, name: str, licence: str | None = None, config: str | None = None) -> str:
    """The text of README.md: what the model is, its figures, how to load it, and the text of the run's config."""
    saved = read_config(model_folder)
    spec, metadata = saved["model"], saved["metadata"]
    models = [model for model in metadata.get("language_models") or [] if model.get("path")]
    architecture = str(metadata.get("architecture") or spec["kind"])
    source = ((metadata.get("config") or {}).get("data") or {}).get("source") or {}
    front: dict[str, Any] = {
        "library_name": "crosscode",
        "tags": [
            "crosscode",
            "sparse-autoencoder",
            "interpretability",
            architecture.replace("_", "-"),
            spec["activation"]["type"],
        ],
        "base_model": hub_names(model["path"] for model in models),
        "datasets": [source["name"]] if source.get("type") == "hub" else [],
        "license": licence,
    }
    front = {field: value for field, value in front.items() if value}
    rows = [
        ("architecture", architecture),
        ("latents", f"{spec['n_latents']:,}"),
        ("activation", _options(spec["activation"])),
    ]
    rows += [("language model", str(model.get("name") or model["path"])) for model in models]
    rows += [("hookpoint", hook) for hook in metadata.get("hookpoints") or []]
    lines = [f"# {name.split('/')[-1]}", "", *_table(("", ""), rows), ""]
    figures = _figures(run)
    if figures:
        lines += ["Held-out figures:", "", *_table(("figure", "value"), figures), ""]
    lines += [
        "```python",
        "import crosscode",
        "",
        f'model = crosscode.BaseCrosscoder.from_pretrained("{name}")',
        "```",
        "",
    ]
    lines += ["It takes raw activations of its hookpoints: the scaling of training is folded into the weights.", ""]
    if config is not None:
        lines += [f"`{RUN_CONFIG}`, with which it was trained:", "", "```yaml", config.rstrip(), "```", ""]
    return f"---\n{dump_yaml(front)}---\n\n" + "\n".join(lines)


def _figures(run: Path | None) -> list[tuple[str, str]]:
    if run is None:
        return []
    found: dict[str, Any] = {}
    for file, kind in (("summary.json", Summary), ("evaluation.json", Evaluation)):
        if (run / file).is_file():
            found |= read_json(run / file, kind)
    rows = [("FVU", found.get("fvu")), ("L0", found.get("l0")), ("dead latents (share)", found.get("dead_fraction"))]
    rows += [(f"FVU, {name}", value) for name, value in (found.get("fvu_by_position") or {}).items()]
    for name, spliced in (found.get("loss_recovered") or {}).items():
        rows.append(
            (f"loss recovered, {name}", spliced.get("loss_recovered") if isinstance(spliced, dict) else spliced)
        )
    return [(name, f"{value:.4g}") for name, value in rows if isinstance(value, (int, float))]


def _options(activation: Mapping[str, Any]) -> str:
    return ", ".join(
        [activation["type"], *(f"{k} {activation[k]}" for k in ("k", "rank_by") if activation.get(k) is not None)]
    )


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> list[str]:
    return [f"| {left} | {right} |" for left, right in [head, ("---", "---"), *rows]]
