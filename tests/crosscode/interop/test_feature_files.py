"""Feature files, read back by the plain steps of their loaders."""

import gzip
import json
import struct
import zlib

import numpy as np
import pandas
import pytest
import yaml
from safetensors.numpy import load_file

import crosscode
from crosscode.commands.cli import main
from crosscode.interop.feature_files import cantor, write_delphi, write_index, write_layer


def test_a_record_is_found_by_its_offset(tmp_path):
    records = [{"index": cantor(3, i), "text": "é" * i} for i in range(5)]
    write_index(tmp_path, {3: write_layer(tmp_path, 3, records)})
    entry = json.loads(gzip.decompress((tmp_path / "index.json.gz").read_bytes()))["3"]
    content = (tmp_path / entry["filename"]).read_bytes()
    for record, offset in zip(records, entry["offsets"], strict=False):
        (length,) = struct.unpack_from("<I", content, offset)
        assert json.loads(zlib.decompress(content[offset + 4 : offset + 4 + length])) == record
    assert entry["offsets"][-1] == len(content) and len(entry["offsets"]) == 6


def test_the_pairing_is_cantors():
    numbers = [cantor(layer, index) for layer in range(20) for index in range(20)]
    assert len(set(numbers)) == 400 and [cantor(0, 0), cantor(1, 0), cantor(0, 1), cantor(2, 0)] == [0, 1, 2, 3]


def test_a_delphi_cache_holds_every_entry_once(tmp_path):
    rng = np.random.default_rng(0)
    dense_HSL = rng.random((4, 6, 25), dtype=np.float32) * (rng.random((4, 6, 25)) < 0.2)
    location_N3 = np.stack(dense_HSL.nonzero(), 1)
    tokens_HS = rng.integers(0, 50, (4, 6))
    write_delphi(tmp_path, location_N3, dense_HSL[tuple(location_N3.T)], tokens_HS, 25, {"ctx_len": 6})
    back_HSL = np.zeros_like(dense_HSL)
    for path in tmp_path.glob("*.safetensors"):
        start, end = map(int, path.stem.split("_"))
        found = load_file(path)
        h_N, s_N, latent_N = found["locations"].T
        assert (latent_N <= end - start).all() and np.array_equal(found["tokens"], tokens_HS)
        back_HSL[h_N, s_N, latent_N + start] = found["activations"]
    np.testing.assert_allclose(back_HSL, dense_HSL, rtol=1e-3)


@pytest.fixture
def set_run(tiny_config, tmp_path):
    """Transcoders of two layers in one run."""
    hooks = [f"blocks.{i}.{hook}" for hook in ("mlp.hook_in", "hook_mlp_out") for i in (0, 2)]
    values = {
        **tiny_config,
        "run_dir": str(tmp_path / "run"),
        "language_models": tiny_config["language_models"][:1],
        "hookpoints": hooks,
        "crosscoder": {
            "type": "compound_cross_layer_transcoder",
            "later_layers": False,
            "n_latents": 32,
            "activation": {"type": "topk", "k": 4},
            "init": {"type": "anthropic_transpose_cross_layer"},
        },
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(tmp_path / "c.yaml")]) == 0
    return tmp_path / "run"


def test_every_layer_of_a_set_has_its_features(set_run, tmp_path, capsys):
    run = crosscode.open(set_run)
    table = run.table()
    assert json.loads((set_run / "evaluation.json").read_text())["replacement_model"] is not None
    assert main(["features", str(set_run), "--to", "circuit-tracer", "--out", str(tmp_path / "ct")]) == 0
    folder = tmp_path / "ct" / "features"
    index = json.loads(gzip.decompress((folder / "index.json.gz").read_bytes()))
    assert list(index) == ["0", "2"]
    for part, layer in enumerate((0, 2)):
        content = (folder / index[str(layer)]["filename"]).read_bytes()
        for i, offset in enumerate(index[str(layer)]["offsets"][:-1]):
            (length,) = struct.unpack_from("<I", content, offset)
            record = json.loads(zlib.decompress(content[offset + 4 : offset + 4 + length]))
            latent = 16 * part + i
            assert record["index"] == cantor(layer, i)
            assert record["act_max"] == pytest.approx(table["max_activation"][latent], rel=1e-5)
            assert len(record["top_logits"]) > 0, "of the layer that it writes to"
            assert sum(record["histogram"]) == table["firings"][latent] and record["histogram"][-1:] != [0]
            values = record["quantile_values"]  # which the page reads as percentiles
            assert len(values) == 100 and values == sorted(values)
            assert record["act_max"] <= values[-1] * 1.001 and values[-1] <= record["act_max"] * (1 + 2 / 32)
    shared = tmp_path / "shared"
    assert main(["report", str(set_run), "--features", str(shared)]) == 0
    assert {p.name: p.read_bytes() for p in (shared / "features").iterdir()} == {
        p.name: p.read_bytes() for p in folder.iterdir()
    }
    assert main(["report", str(set_run), "--features", str(shared)]) == 2
    assert main(["features", str(set_run), "--to", "circuit-tracer", "--layer", "1", "--out", str(tmp_path / "x")]) == 2
    assert "latents of 2 layers" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_data_set_has_a_row_for_each_latent_and_delphi_a_module_for_each_layer(set_run, tmp_path):
    run = crosscode.open(set_run)
    assert main(["features", str(set_run), "--to", "dataset", "--out", str(tmp_path / "rows")]) == 0
    rows = pandas.read_parquet(tmp_path / "rows" / "latents.parquet")
    np.testing.assert_allclose(rows["max_activation"], run.table()["max_activation"], rtol=1e-6)
    fires = rows[rows["firings"] > 0].iloc[0]
    best = fires["examples"][0]
    assert best["activations"][best["peak"]] == pytest.approx(fires["max_activation"], rel=1e-4)
    assert "config_name: latents" in (tmp_path / "rows" / "README.md").read_text()
    assert main(["features", str(set_run), "--to", "delphi", "--out", str(tmp_path / "delphi")]) == 0
    found = {path.name: sorted(path.glob("*.safetensors")) for path in (tmp_path / "delphi").iterdir()}
    assert sorted(found) == ["blocks.0.mlp.hook_in", "blocks.2.mlp.hook_in"]
    for part, files in enumerate(map(found.get, sorted(found))):
        counts_L = np.zeros(16)
        for file in files:
            np.add.at(counts_L, load_file(file)["locations"][:, 2] + int(file.stem.split("_")[0]), 1)
        np.testing.assert_array_equal(counts_L, run.table()["firings"][16 * part : 16 * part + 16])
