"""The thread that owns the decoder: requests go in from any thread, what is emitted comes out through callbacks."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ..engine.decoder import LatentDecoder
from ..engine.requests import Emitted, Request

logger = logging.getLogger(__name__)

Sink = Callable[[Emitted], Any]
LOOK_EVERY = 8  # steps between two looks of the host while nobody streams
FAILURES = 5  # in a row, after which the server calls itself unhealthy


class Stopped(RuntimeError):
    """The worker takes nothing any more."""


class Worker:
    """Runs a decoder in a thread of its own.

    A failed step fails the answers in work, never the thread. Everything that touches the model runs here (`call`).
    """

    def __init__(self, decoder: LatentDecoder):
        self.decoder = decoder
        self.changed = threading.Condition()
        self.sinks: dict[int, tuple[Sink, bool]] = {}
        self.jobs: deque[tuple[Callable[[], Any], Future]] = deque()
        self.stopping = False
        self.failures = 0
        self.thread = threading.Thread(target=self._run, name="decoder", daemon=True)

    def start(self) -> None:
        self.thread.start()

    @property
    def healthy(self) -> bool:
        return self.thread.is_alive() and self.failures < FAILURES

    def submit(self, request: Request, sink: Sink, stream: bool = False) -> int:
        """Queue a request. `sink` is called in this object's thread with everything it emits; quickly, please."""
        with self.changed:
            if self.stopping:
                raise Stopped("this worker has stopped")
            ticket = self.decoder.submit(request)
            self.sinks[ticket] = (sink, stream)
            self.changed.notify()
            return ticket

    def cancel(self, ticket: int) -> None:
        """Give an answer up; its row is free at the next step."""
        with self.changed:
            if ticket in self.sinks:
                self.decoder.cancel(ticket)
                self.changed.notify()

    def call(self, function: Callable[[], Any]) -> Future:
        """Run a function between two steps."""
        future: Future = Future()
        with self.changed:
            if self.stopping:
                future.set_exception(Stopped("this worker has stopped"))
                return future
            self.jobs.append((function, future))
            self.changed.notify()
        return future

    def stop(self) -> None:
        """Give everything up and end the thread."""
        with self.changed:
            self.stopping = True
            for ticket in self.sinks:
                self.decoder.cancel(ticket)
            self.changed.notify()
        if self.thread.is_alive():
            self.thread.join()

    def _run(self) -> None:
        while True:
            with self.changed:
                while not (self.jobs or self.decoder.busy or self.decoder.cancelled or self.stopping):
                    self.changed.wait()
                if self.stopping and not self.decoder.busy:
                    break
                jobs, streams = list(self.jobs), any(stream for _, stream in self.sinks.values())
                self.jobs.clear()
            for function, future in jobs:
                self._do(function, future)
            self._step(1 if streams else LOOK_EVERY)
        for _, future in self.jobs:
            if future.set_running_or_notify_cancel():
                future.set_exception(Stopped("this worker has stopped"))

    @staticmethod
    def _do(function: Callable[[], Any], future: Future) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function())
        except BaseException as error:  # goes to whoever waits
            future.set_exception(error)

    def _step(self, look_every: int) -> None:
        try:
            events = self.decoder.advance(look_every)
            self.failures = 0
        except Exception:
            # What was emitted before is kept by the decoder and comes with the next turn.
            self.failures += 1
            logger.exception("a decoding step failed; the answers in work fail with it")
            time.sleep(0.01 * self.failures)
            return
        for event in events:
            with self.changed:
                sink, _ = self.sinks[event.index]
                if event.generation is not None:
                    del self.sinks[event.index]
            try:
                sink(event)
            except Exception:
                logger.exception("an answer's receiver failed")
