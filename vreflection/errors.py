"""Errors a user can act on: each message names what was expected, what was got, and what to do."""


class ConfigError(ValueError):
    """A configuration file or flag holds an unknown key, a wrong type or an impossible combination."""


class DataError(ValueError):
    """A data row, image or box is unusable. `source` is `file:row` where known."""

    def __init__(self, reason: str, message: str, source: str | None = None):
        super().__init__(f"{source}: {message}" if source else message)
        self.reason = reason
        self.message = message
        self.source = source

    def __reduce__(self):
        # Raised in data-loader workers, so it must survive pickling whole.
        return type(self), (self.reason, self.message, self.source)


class CheckpointError(ValueError):
    """A checkpoint is of the wrong stage or format, or lacks or mis-shapes tensors."""


class TrainingError(RuntimeError):
    """A run that had to end: what was saved is kept, and the message says how to go on."""
