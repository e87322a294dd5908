"""Errors a user can act on: each message names what was expected, what was got, and what to do."""

import json

_NOTE = "data error "


class ConfigError(ValueError):
    """A configuration file or flag holds an unknown key, a wrong type or an impossible combination."""


class DataError(ValueError):
    """A data row, image or box is unusable. `source` is `file:row` where known.

    Given one text alone, it is the error whose traceback ends that text: so does torch raise again what was raised in a
    data-loader worker. A note in the traceback carries what the message does not tell.
    """

    def __init__(self, reason: str, message: str | None = None, source: str | None = None):
        if message is None:
            reason, message, source = self._from_traceback(reason)
        super().__init__(f"{source}: {message}" if source else message)
        self.reason = reason
        self.message = message
        self.source = source
        self.add_note(_NOTE + json.dumps([reason, source]))

    @classmethod
    def _from_traceback(cls, text: str) -> tuple[str, str, str | None]:
        _, start, last = text.rpartition(f"\n{cls.__module__}.{cls.__qualname__}: ")
        said, note, rest = last.rpartition(f"\n{_NOTE}")
        if not start or not note:
            raise TypeError("DataError: expected a reason and a message, got one text that is no traceback of one")
        reason, source = json.loads(rest.partition("\n")[0])
        return reason, said.removeprefix(f"{source}: ") if source else said, source

    def __reduce__(self):
        # Raised in data-loader workers, so it must survive pickling whole.
        return type(self), (self.reason, self.message, self.source)


class CheckpointError(ValueError):
    """A checkpoint is of the wrong stage or format, or lacks or mis-shapes tensors."""


class TrainingError(RuntimeError):
    """A run that had to end: what was saved is kept, and the message says how to go on."""
