"""A headless Chromium, driven by chromedriver's HTTP interface (WebDriver): both are Debian packages."""

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

MISSING = " and ".join(f"no {name}" for name in ("chromium", "chromedriver") if shutil.which(name) is None)


class Browser:
    """One window. Use it with `with`."""

    def __init__(self, width: int = 1200, height: int = 900, dark: bool = False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._process = subprocess.Popen(
            ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._at = f"http://127.0.0.1:{port}"
        arguments = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", f"--window-size={width},{height}"]
        arguments += ["--no-sandbox"] * (os.geteuid() == 0) + ["--force-dark-mode"] * dark
        options = {"args": arguments, "binary": shutil.which("chromium")}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            for _ in range(100):
                try:
                    found = self._call("", {"capabilities": {"alwaysMatch": wanted}})
                    break
                except urllib.error.URLError as error:
                    if isinstance(error, urllib.error.HTTPError):
                        raise RuntimeError(error.read().decode()) from error
                    time.sleep(0.1)
            else:
                raise RuntimeError("chromedriver does not answer")
        except BaseException:
            self._process.kill()
            raise
        self._at = f"{self._at}/session/{found['sessionId']}"
        if width < 500:  # windows have a least width, emulated screens have none
            self.resize(width, height)
        if dark:
            self.devtools(
                "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            urllib.request.urlopen(urllib.request.Request(self._at, method="DELETE"), timeout=30).close()
        finally:
            self._process.kill()
            self._process.wait()

    def _call(self, path: str, value: Any) -> Any:
        url = self._at + (path if "/session/" in self._at else "/session")
        request = urllib.request.Request(url, json.dumps(value).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._call("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def resize(self, width: int, height: int) -> None:
        """The page, without the window's frame."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", screen)

    def open(self, url: str) -> None:
        self._call("/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function body returns, awaited if it is a promise."""
        return self._call("/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, condition: str, seconds: float = 20) -> None:
        """Until an expression holds."""
        end = time.monotonic() + seconds
        while not self.run(f"return Boolean({condition})"):
            if time.monotonic() > end:
                raise AssertionError(f"never came true: {condition}; console: {self.errors()}")
            time.sleep(0.02)

    def errors(self) -> list[str]:
        """What the console has said since the last call: script errors and refusals of the content security policy."""
        return [one["message"] for one in self._call("/se/log", {"type": "browser"}) if one["level"] == "SEVERE"]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.devtools("Page.captureScreenshot", {})["data"]))
