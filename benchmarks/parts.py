"""What `device_check` and the processes of its parts agree on; it imports nothing that takes time."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

LINES = "device_check.jsonl"
LOGS = "device_check.log"
# The exit status of a part whose process can use the device no more.
LOST = 3
# Between the kind of a part and its implementation.
SEPARATOR = "-"
_LOCK = threading.Lock()


def note(path: Path, **row) -> None:
    """Append a result to a file of JSON lines: it is on disk before anything else happens."""
    text = json.dumps({"at_s": round(time.time(), 1), **row}, allow_nan=False, default=str) + "\n"
    with _LOCK, open(path, "ab") as file:
        # One write: processes that append at the same time do not mix their lines.
        os.write(file.fileno(), text.encode())
        os.fsync(file.fileno())


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
