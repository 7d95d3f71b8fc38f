"""Audio input: decoding of files, downloads, archives, VAD and fbank features."""

from typing import Any

_WAVEFORM = ("SAMPLE_RATE", "AudioError", "load_audio", "probe_audio")  # names with this import path in release 0.1


def __getattr__(name: str) -> Any:
    if name in _WAVEFORM:
        from . import waveform

        return getattr(waveform, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
