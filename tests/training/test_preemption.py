"""Ctrl-C: the first saves a checkpoint, the second ends the run immediately, and none is lost."""

import contextlib
import signal

import pytest

from hf_speechllm.training.preemption import Preemption, interruptible


def test_second_interruption_ends_at_once(caplog):
    preemption, before = Preemption(), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), preemption.handle_signals():
        signal.raise_signal(signal.SIGINT)
        assert preemption.received == signal.SIGINT
        assert "press Ctrl-C again to end immediately" in caplog.text
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_interruption_that_a_library_catches_ends_the_block():
    done, before = [], signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptible():
        with contextlib.suppress(BaseException):  # as in the fingerprints of `datasets`
            signal.raise_signal(signal.SIGINT)
        done.append(True)
    assert done and signal.getsignal(signal.SIGINT) is before
    with interruptible():
        pass
