"""The emulator and the benches' cases, for tests in a process in which Triton compiles (its interpreter is chosen at import)."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
BENCHES = HERE.parents[2] / "benches"
can_compile = os.environ.get("TRITON_INTERPRET") != "1" and importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if can_compile else ["test_*.py"]
sys.path += [str(path) for path in (HERE, BENCHES) if str(path) not in sys.path]
