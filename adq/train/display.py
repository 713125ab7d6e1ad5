"""What a person sees of a run: progress bars on a terminal, one line an epoch anywhere, the final table."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from adq.train.engine import Totals


class Bar:
    """The progress bar of one epoch; silent where there is no terminal."""

    def __init__(self, progress: Progress | None, task: Any, samples: int) -> None:
        self._progress, self._task = progress, task
        self._began, self._before = time.perf_counter(), samples

    def update(self, done: int, totals: Totals, lr: float) -> None:
        """Show batches done, mean loss, top-1, learning rate and images/s of this process so far."""
        if self._progress is None or totals.samples == 0:
            return
        speed = (totals.samples - self._before) / max(1e-9, time.perf_counter() - self._began)
        text = (
            f"loss {totals.loss.item() / totals.samples:.4f}  "
            f"top-1 {100 * totals.correct.item() / totals.samples:.2f}  "
            f"lr {lr:.2e}  {speed:,.0f} images/s"
        )
        self._progress.update(self._task, completed=done, status=text)


class Display:
    """Prints for the first process only.

    Args:
        active: False on every process but the first.
        console: where to; default standard output.
    """

    def __init__(self, active: bool = True, console: Console | None = None) -> None:
        self.active = active
        self.console = console or Console()

    def say(self, text: str) -> None:
        """One line of text."""
        if self.active:
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    @contextmanager
    def epoch(self, phase: str, epoch: int, epochs: int, batches: int, start: int, samples: int = 0) -> Iterator[Bar]:
        """A progress bar over the batches of an epoch, of which ``start``, with so many samples, are done."""
        if not (self.active and self.console.is_terminal):
            yield Bar(None, None, samples)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(f"{phase} {epoch + 1}/{epochs}", total=batches, completed=start, status="")
            yield Bar(progress, task, samples)

    def row(self, row: dict[str, Any], epochs: int) -> None:
        """One finished epoch."""
        self.say(
            f"{row['phase']:>5} {row['epoch']:>3}/{epochs}  "
            f"loss {row['train_loss']:.4f}  top-1 {row['train_top1']:.2f}  "
            f"test loss {row['test_loss']:.4f}  test top-1 {row['test_top1']:.2f}  lr {row['lr']:.2e}  "
            f"{row['images_per_second']:,.0f} images/s"
        )

    def result(self, result: dict[str, Any]) -> None:
        """The final table."""
        if not self.active:
            return
        table = Table("", "float", "quantized", title=f"{result['model']} on {result['data']}")
        table.add_row("top-1 %", f"{result['float_top1']:.2f}", f"{result['quantized_top1']:.2f}")
        table.add_row("average bits, quantized layers", "32", f"{result['average_bits_quantized']:.3f}")
        table.add_row("average bits, whole network", "32", f"{result['average_bits_network']:.3f}")
        table.add_row("bytes", f"{result['bytes_float']:,}", f"{result['bytes_packed']:,}")
        table.add_row("top-1 after calibration, before training", "", f"{result['calibrated_top1']:.2f}")
        self.console.print(table)
