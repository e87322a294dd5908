"""A run's folder on disk: raw answers that survive a kill, and locks that keep processes out of each other's way.

`raw/<benchmark>.jsonl`, or with N processes `raw/<benchmark>.<i>-of-<N>.jsonl`. A file has one writer, which appends
whole lines; so a killed one leaves at most its last line torn, and that line is cut off before anything is appended.
Which items are done is read from all files, so a run may go on with another number of processes.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from ..data.folders import make_folder
from ..errors import ConfigError, DataError
from .records import RawAnswer

logger = logging.getLogger(__name__)

RAW, LOCKS = "raw", ".locks"
# A killed process loses nothing that was handed to the system; a power cut loses what came since the last sync.
SYNC_SECONDS = 5.0
_BLOCK = 2**16


@dataclass(frozen=True)
class Shard:
    """One of `count` processes that share a run, from 0."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From `i/n`.

        Raises:
            ConfigError: anything else, or i outside 0 to n - 1.
        """
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
        if found is None or not int(found[1]) < int(found[2]):
            raise ConfigError(f"shard: expected i/n with 0 <= i < n, such as 0/4, got {text!r}")
        return cls(int(found[1]), int(found[2]))

    @property
    def name(self) -> str:
        return f"{self.index}-of-{self.count}"

    def raw_file(self, out: Path, benchmark: str) -> Path:
        return out / RAW / (f"{benchmark}.jsonl" if self.count == 1 else f"{benchmark}.{self.name}.jsonl")


class RawWriter:
    """Appends answers to one file, each as one line in one write."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.synced = time.monotonic()

    def write(self, answer: RawAnswer) -> None:
        line = json.dumps(answer.as_dict(), ensure_ascii=False).encode() + b"\n"
        while line:  # a disk that is filling up takes less than it is given
            line = line[os.write(self.handle, line) :]
        if time.monotonic() - self.synced >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        os.fsync(self.handle)
        self.synced = time.monotonic()

    def close(self) -> None:
        self.sync()
        os.close(self.handle)


def raw_files(out: Path, benchmark: str) -> list[Path]:
    """All raw files of a benchmark, whoever wrote them."""
    pattern = re.compile(rf"{re.escape(benchmark)}(\.\d+-of-\d+)?\.jsonl")
    return sorted(path for path in (out / RAW).glob("*.jsonl") if pattern.fullmatch(path.name))


def done_ids(out: Path, benchmark: str) -> set[str]:
    """Ids of the items answered so far; a last line that is still being written does not count.

    Raises:
        DataError: `raw-damaged` for a line that is no answer.
    """
    found: set[str] = set()
    for path in raw_files(out, benchmark):
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    found.add(json.loads(line)["id"])
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(
                        "raw-damaged",
                        f"expected an answer, got {line[:80]!r} ({error!r}); remove the line to have its item asked "
                        "again, or restore the file",
                        f"{path}:{number}",
                    ) from None
    return found


def cut_torn_line(path: Path) -> int:
    """Cut off a last line that has no end; how many bytes went."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        end = size
        while end:
            start = max(0, end - _BLOCK)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)
            os.fsync(file.fileno())
        return size - end


@contextmanager
def claimed(out: Path, shard: Shard) -> Iterator[ExitStack]:
    """Hold a shard of a run while the block runs. What is entered into the stack before `close` is done by one process
    at a time: the caller checks the manifest under it, then closes it and starts.

    Torn lines of processes that are gone are cut off.

    Raises:
        ConfigError: the shard is being worked on, or the run is by another number of processes.
    """
    make_folder(out)
    folder = out / LOCKS
    folder.mkdir(exist_ok=True)
    with ExitStack() as whole, ExitStack() as setup:
        run = setup.enter_context((folder / "run").open("a+"))
        _lock(run, wait=True)
        own = whole.enter_context((folder / shard.name).open("a+"))
        if not _lock(own):
            raise ConfigError(
                f"out: shard {shard.index}/{shard.count} of {str(out)!r} is being worked on by {_holder(own)}; wait "
                "for it, stop it, or take another --shard"
            )
        own.truncate(0)
        own.write(f"process {os.getpid()} on {socket.gethostname()}")
        own.flush()
        running = _others(folder, shard)
        divided = [name for name in running if not name.endswith(f"-of-{shard.count}")]
        if divided:
            raise ConfigError(
                f"out: expected all processes of {str(out)!r} to be of {shard.count}, got {', '.join(divided)} at "
                "work; wait for them or stop them, then any number may go on"
            )
        _mend(out, shard, running)
        whole.callback(own.truncate, 0)
        yield setup


def _others(folder: Path, shard: Shard) -> list[str]:
    """Shards that other processes are working on."""
    running = []
    for path in sorted(folder.glob("*-of-*")):
        if path.name == shard.name:
            continue
        with path.open("a+") as file:
            if not _lock(file):
                running.append(path.name)
    return running


def _mend(out: Path, shard: Shard, running: list[str]) -> None:
    for path in (out / RAW).glob("*.jsonl"):
        if not any(path.name.endswith(f".{name}.jsonl") for name in running):
            cut = cut_torn_line(path)
            if cut:
                logger.info("%s: cut off a last line of %d bytes that was never finished", path, cut)


def _holder(file: TextIO) -> str:
    file.seek(0)
    return file.read().strip() or "another process"


def _lock(file: TextIO, wait: bool = False) -> bool:
    """Lock an open file until it is closed; False where another process has it."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks
        logger.info("%s cannot be locked (%s); start each shard once", file.name, error)
    return True
