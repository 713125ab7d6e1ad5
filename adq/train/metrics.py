"""The run's numbers as they come: one JSON object a line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends rows to ``metrics.jsonl``, each on the disk before the next; also to TensorBoard where given one.

    Args:
        path: the file; rows already in it stay.
        active: False on every process but the first: nothing is written then.
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or None.
    """

    def __init__(self, path: Path, active: bool = True, writer: Any = None) -> None:
        self.path = path
        self.active = active
        self.writer = writer

    def write(self, row: dict[str, Any]) -> None:
        """Append one row."""
        if not self.active:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self.writer is not None and "epoch" in row:
            for key, value in row.items():
                if isinstance(value, float):
                    self.writer.add_scalar(f"{row['phase']}/{key}", value, row["epoch"])
            self.writer.flush()

    def close(self) -> None:
        """No rows come after this."""
        if self.writer is not None:
            self.writer.close()

    def size(self) -> int:
        """Bytes written so far; a checkpoint notes them."""
        return self.path.stat().st_size if self.path.exists() else 0

    def truncate(self, size: int) -> None:
        """Drop what was written after a checkpoint that is being resumed from."""
        if self.active and self.path.exists() and self.path.stat().st_size > size:
            os.truncate(self.path, size)

    def rows(self) -> list[dict[str, Any]]:
        """Everything written so far."""
        return (
            [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
            if self.path.exists()
            else []
        )
