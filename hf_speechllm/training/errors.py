"""Errors that end a training run; messages give the reason and say how to resume."""


class FaultError(RuntimeError):
    """A fault that ends the run: too many non-finite steps, or a dead or hanging loader process."""


class Preempted(RuntimeError):
    """The run ended because of a signal, after saving a checkpoint."""
