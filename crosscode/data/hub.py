"""Whether anybody answers at the Hugging Face hub: asked once, and at once."""

from __future__ import annotations

import socket
import sys
import threading
from contextlib import suppress
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies

SECONDS = 5.0


@cache
def look_for_hub() -> str | None:
    """To be called before something is looked up on the hub. Where nobody answers there, the libraries are told to read
    their caches alone (as `HF_HUB_OFFLINE=1` does), rather than to ask again and again for half a minute; what is not in
    them is missing for the reason that is returned.

    Nothing is asked where that is set already, or where there are proxies, behind which the hub may be reached.
    """
    from huggingface_hub import constants

    proxies = getproxies().keys() & {"http", "https", "all"}
    if constants.HF_HUB_OFFLINE or proxies or _answers(constants.ENDPOINT):
        return None
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    return f"nobody answers at {constants.ENDPOINT}"


def _answers(address: str) -> bool:
    parts, found = urlsplit(address), list[bool]()

    def ask() -> None:
        with suppress(OSError):
            port = parts.port or (80 if parts.scheme == "http" else 443)
            socket.create_connection((parts.hostname or "", port), SECONDS).close()
            found.append(True)

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name knows no time limit of ours
    thread.start()
    thread.join(SECONDS)
    return bool(found)
