"""Token ids in, pieces of clean text out: no half characters, no special tokens, nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from ..model.processor import VReflectionProcessor

HALF = "\ufffd"  # what a tokenizer makes of the first bytes of a character


class TextStream:
    """The text of one answer as it grows. `stopped` once a stop text appeared; nothing behind it is ever sent.

    Args:
        min_tokens: stop texts that begin in the text of so many first tokens do not count.
    """

    def __init__(self, processor: VReflectionProcessor, stops: Sequence[str], min_tokens: int = 0):
        self.processor, self.stops = processor, [stop for stop in stops if stop]
        self.min_tokens = min_tokens
        self.ids: list[int] = []
        self.text = ""  # all that was decided so far
        self.sent = 0  # characters of it
        self.exempt = 0  # characters in which no stop text begins
        self.stopped = False
        self._settled = 0  # ids whose text cannot change any more
        self._before = ""

    def push(self, token: int) -> str:
        """The piece of text that this token makes certain, often empty."""
        if self.stopped:
            return ""
        self.ids.append(token)
        # Decoding from a little before keeps spaces right without going over the whole answer again.
        tail = self.processor.decode(self.ids[self._settled :])
        if tail.endswith(HALF):
            return ""
        self.text = self._before + tail
        if len(self.ids) <= self.min_tokens:
            self.exempt = len(self.text)
        if len(self.ids) - self._settled > 32:
            start = len(self.ids) - 16
            rest = self.processor.decode(self.ids[start:])
            if self.text.endswith(rest):
                self._settled, self._before = start, self.text[: len(self.text) - len(rest)]
        return self._give(len(self.text) - self._held())

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        if self.stopped:
            return ""
        self.text = self._before + self.processor.decode(self.ids[self._settled :])
        return self._give(len(self.text))

    def _give(self, until: int) -> str:
        places = [place for stop in self.stops if (place := self.text.find(stop, self.exempt)) >= 0]
        if places:
            self.stopped, until = True, min(places)
            self.text = self.text[:until]
        piece = self.text[self.sent : max(until, self.sent)]
        self.sent += len(piece)
        return piece

    def _held(self) -> int:
        """Characters at the end that may be the beginning of a stop text."""
        longest = 0
        for stop in self.stops:
            for size in range(min(len(stop) - 1, len(self.text) - self.exempt), longest, -1):
                if self.text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
