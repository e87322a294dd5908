"""Progress bars on the terminal; plain lines where there is none."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class PhaseBars:
    """One bar per phase under an overall bar whose length is expected seconds."""

    def __init__(self, phases: list[tuple[str, float]], title: str, quiet: bool = False):
        self.weights = dict(phases)
        console = Console(stderr=True)
        self.plain = not console.is_terminal
        self.quiet = quiet
        self.bars = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=18),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or self.plain,
        )
        self.total = self.bars.add_task(title, total=round(sum(self.weights.values())))
        self.tasks: dict[str, int] = {}
        self.share: dict[str, float] = {}
        self.started: dict[str, float] = {}

    def __enter__(self) -> PhaseBars:
        self.bars.start()
        return self

    def __exit__(self, *_) -> None:
        self.bars.stop()

    def update(self, phase: str, done: int, total: int) -> None:
        self.started.setdefault(phase, time.monotonic())
        if self.plain and not self.quiet and done >= total and self.share.get(phase, 0) < 1:
            print(f"{phase}: done in {time.monotonic() - self.started[phase]:.0f} s", file=sys.stderr, flush=True)
        if phase not in self.tasks:
            self.tasks[phase] = self.bars.add_task(phase, total=total)
        self.bars.update(self.tasks[phase], completed=done, total=total)  # pyright: ignore[reportArgumentType]
        self.share[phase] = done / max(total, 1)
        seconds = sum(self.weights.get(name, 0) * share for name, share in self.share.items())
        self.bars.update(self.total, completed=round(seconds))


def log_to_terminal() -> None:
    """The package's own notices and warnings, on the error stream."""
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("vreflection")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
