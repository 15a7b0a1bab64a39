"""Doubles of object stores, served on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
