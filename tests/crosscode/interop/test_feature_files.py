"""Feature files, read back by the plain steps of their loaders."""

import gzip
import json
import struct
import zlib

import numpy as np
from safetensors.numpy import load_file

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
