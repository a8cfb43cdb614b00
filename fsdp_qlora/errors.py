"""The errors a user can meet. Each message names the value, the rule and the remedy in one line."""


class FsdpQloraError(Exception):
    """Base of every error this package raises for users, files and data; the command line prints it without a traceback."""

    exit_code = 1

    rank_local: bool = False
    """Set where only this rank saw the error, so that the command line prints it although it is not rank 0."""


class ConfigError(FsdpQloraError):
    """A setting, or a combination of settings, that cannot work; the message lists every problem found."""

    exit_code = 2


class ModelError(FsdpQloraError):
    """A model that cannot be found, downloaded or handled (unknown family, no LoRA target matches, ...)."""


class WeightsError(FsdpQloraError):
    """A base checkpoint that is incomplete, damaged or of an unsupported form; names the file and the tensor."""


class DataError(FsdpQloraError):
    """A dataset or a row that cannot be used; names file, line and reason."""


class CheckpointError(FsdpQloraError):
    """An adapter or training checkpoint that is incomplete or does not fit the run."""


class TrainingError(FsdpQloraError):
    """A run that must stop: non-finite loss or gradients, a rank that failed."""


class Interrupted(FsdpQloraError):
    """A signal asked the run to end before there was anything to save; no failure."""

    exit_code = 0
