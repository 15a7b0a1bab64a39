"""Files of what latents do, for other tools: circuit-tracer's feature files, delphi's cache, and a data set.

The first two layouts are as their loaders read them. Axes: N active entries · L latents.
"""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosscode.config.reading import dump_yaml
from crosscode.errors import InputError
from crosscode.files import write_parts

INDEX, TABLE, CARD = "index.json.gz", "latents.parquet", "README.md"
DATASET_FILES = (TABLE, CARD)


def features_kind(folder: Path) -> str:
    """ "circuit-tracer" or "dataset": what was written there.

    Raises:
        InputError: neither.
    """
    if (folder / "features" / INDEX).is_file():
        return "circuit-tracer"
    if all((folder / name).is_file() for name in DATASET_FILES):
        return "dataset"
    raise InputError(
        f"features = {str(folder)!r}: holds nothing that `crosscode features --to circuit-tracer` or --to dataset wrote"
    )


def cantor(layer: int, index: int) -> int:
    """The pairing by which circuit-tracer numbers a feature of a layer."""
    return (layer + index) * (layer + index + 1) // 2 + index


def write_layer(folder: Path, layer: int, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """`layer_N.bin` with the records of features 0, 1, ...: each a little-endian length of four bytes and zlib-compressed JSON.

    Returns:
        The layer's entry in the index: `filename`, and `offsets`, one more than there are records.
    """
    name, offsets, parts = f"layer_{layer}.bin", [0], []
    for record in records:
        packed = zlib.compress(json.dumps(record, separators=(",", ":"), allow_nan=False).encode())
        parts += [struct.pack("<I", len(packed)), packed]
        offsets.append(offsets[-1] + 4 + len(packed))
    write_parts(folder / name, parts)
    return {"filename": name, "offsets": offsets}


def write_index(folder: Path, layers: dict[int, dict[str, Any]]) -> None:
    """`index.json.gz`, which names the layers' files."""
    text = json.dumps({str(layer): entry for layer, entry in layers.items()})
    write_parts(folder / INDEX, [gzip.compress(text.encode(), mtime=0)])


def write_delphi(
    folder: Path,
    location_N3: NDArray[np.int64],
    value_N: NDArray[np.float32],
    tokens_HS: NDArray[np.int64],
    n_latents: int,
    config: dict[str, Any],
    n_files: int = 10,
) -> None:
    """delphi's cache of one module: `START_STOP.safetensors` for equal shares of the latents, and `config.json`.

    Args:
        location_N3: sequence, position and latent of each active entry.
        tokens_HS: sequences of one length.
    """
    from safetensors.numpy import save

    edges = np.linspace(0, n_latents, min(n_files, n_latents) + 1).astype(int)
    order_N = np.argsort(location_N3[:, 2], kind="stable")
    location_N3, value_N = location_N3[order_N], value_N[order_N]
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        first, last = np.searchsorted(location_N3[:, 2], [start, stop])
        some_N3 = location_N3[first:last] - np.array([0, 0, start])
        content = {
            "locations": np.ascontiguousarray(some_N3),
            "activations": value_N[first:last].astype(np.float16),
            "tokens": np.ascontiguousarray(tokens_HS),
        }
        write_parts(folder / f"{start}_{stop - 1}.safetensors", [save(content)])
    write_parts(folder / "config.json", [json.dumps(config, indent=2).encode()])


def write_dataset(folder: Path, rows: list[dict[str, Any]], name: str, base_models: list[str]) -> None:
    """`latents.parquet`, a row for each latent, and a card, as the hub's data sets have them."""
    import pyarrow
    import pyarrow.parquet

    buffer = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, compression="zstd")
    write_parts(folder / TABLE, [buffer.getvalue().to_pybytes()])
    front = {
        "tags": ["crosscode", "sparse-autoencoder", "interpretability"],
        "configs": [{"config_name": "latents", "data_files": TABLE}],
        "base_model": base_models,
    }
    text = (
        f"# Latents of {name}\n\nA row for each latent: firing rates, decoder norms, examples, logits, neighbours.\n\n"
    )
    text += '```python\nimport datasets\n\nlatents = datasets.load_dataset("USER/NAME", split="train")\n```\n'
    write_parts(folder / CARD, [f"---\n{dump_yaml(front)}---\n\n{text}".encode()])
