"""Errors that a user can correct. Messages name the place and the fix. The command line prints them and exits with code 2."""


class TrainingError(Exception):
    """Base class of the errors below."""


class ConfigError(TrainingError):
    """The configuration is invalid. The message names the file and every wrong setting."""


class DataError(TrainingError):
    """The data cannot be used for training. The message names the file, the row if there is one, and the fix."""


class RunError(TrainingError):
    """The folder of a run cannot be used. The message says what to do."""


class DivergenceError(TrainingError):
    """A loss or a weight is not a finite number."""
