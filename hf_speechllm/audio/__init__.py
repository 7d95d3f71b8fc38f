"""Recordings in, features out: decoding of files, downloads, archives, VAD and fbank."""

from typing import Any

_WAVEFORM = ("SAMPLE_RATE", "AudioError", "load_audio", "probe_audio")  # the names of release 0.1 under this path


def __getattr__(name: str) -> Any:
    if name in _WAVEFORM:
        from . import waveform

        return getattr(waveform, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
