"""Errors that end a training run with a reason and a way on."""


class FaultError(RuntimeError):
    """A fault that ends the run: too many non-finite steps, or a dead or hanging loader process."""


class Preempted(RuntimeError):
    """The run was asked to end by a signal, and has saved a checkpoint."""
