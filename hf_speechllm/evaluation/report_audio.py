"""Recordings in a report: durations, and small copies of a few recordings that are embedded in the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ..audio.waveform import SAMPLE_RATE, AudioError, header_seconds, is_url, load_audio, probe_audio
from ..console import progress_bar
from ..options import usable_cores

MAX_SOUND_SECONDS = 120.0  # duration of an embedded recording, at most; about 0.5 MB


class Sound(NamedTuple):
    """A recording that is embedded in a page.

    Args:
        uri: data URI, Opus in Ogg, mono; empty if the recording cannot be read.
        note: says that the recording is cut, or why it cannot be read; otherwise empty.
    """

    uri: str
    note: str


def measure_durations(recordings: Mapping[str, str]) -> tuple[dict[str, float], dict[str, str]]:
    """Reads the durations of local recordings from their headers; skips URLs, which would need a download.

    Args:
        recordings: paths and URLs by ID.

    Returns:
        Seconds by ID, and the errors of unreadable recordings by ID.
    """
    durations: dict[str, float] = {}
    reasons: dict[str, str] = {}
    local = {id_: path for id_, path in recordings.items() if not is_url(path)}
    with ThreadPoolExecutor(min(8, usable_cores())) as pool:
        measured = progress_bar(
            pool.map(_duration, local.values()), desc="measuring", total=len(local), unit=" recordings", leave=False
        )
        for id_, duration in zip(local, measured, strict=True):
            if isinstance(duration, str):
                reasons[id_] = duration
            else:
                durations[id_] = duration
    return durations, reasons


def _duration(path: str) -> float | str:
    """Returns seconds, or the error message of an unreadable recording."""
    if (seconds := header_seconds(path)) is not None:
        return seconds
    try:
        num_samples, rate = probe_audio(path)
    except AudioError as error:
        return str(error)
    return num_samples / rate


def embed_sound(source: str) -> Sound:
    """Encodes a recording as a data URI.

    Args:
        source: path or URL. A recording of more than `MAX_SOUND_SECONDS` is cut.
    """
    import soundfile

    try:
        waveform = load_audio(source)
    except AudioError as error:
        return Sound("", str(error))
    note = ""
    if len(waveform) > MAX_SOUND_SECONDS * SAMPLE_RATE:
        note = f"first {MAX_SOUND_SECONDS:.0f} s of {len(waveform) / SAMPLE_RATE:.0f} s"
        waveform = waveform[: int(MAX_SOUND_SECONDS * SAMPLE_RATE)]
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(waveform, -1, 1), SAMPLE_RATE, format="OGG", subtype="OPUS")
    return Sound("data:audio/ogg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"), note)
