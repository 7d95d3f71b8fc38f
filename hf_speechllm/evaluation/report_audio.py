"""What a report needs of recordings: how long they are, and the sound of a few, small enough for a page."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ..audio.waveform import SAMPLE_RATE, AudioError, header_seconds, is_url, load_audio, probe_audio

MAX_SOUND_SECONDS = 120.0  # of a recording in a page; about 0.5 MB


class Sound(NamedTuple):
    """A recording for a page.

    Args:
        uri: a data URI, Opus in Ogg, mono; empty if the recording can't be read.
        note: what the reader should know: that it is cut, or why it is not there.
    """

    uri: str
    note: str


def measure_durations(recordings: Mapping[str, str]) -> tuple[dict[str, float], dict[str, str]]:
    """Durations by the headers of local recordings; URLs are left out, since they would all be downloaded.

    Args:
        recordings: paths by ID.

    Returns:
        Seconds by ID, and the reasons why others have none, by ID.
    """
    durations: dict[str, float] = {}
    reasons: dict[str, str] = {}
    local = {id_: path for id_, path in recordings.items() if not is_url(path)}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for id_, duration in zip(local, pool.map(_duration, local.values()), strict=True):
            if isinstance(duration, str):
                reasons[id_] = duration
            else:
                durations[id_] = duration
    return durations, reasons


def _duration(path: str) -> float | str:
    """Seconds, or the reason why they can't be told."""
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
        source: path or URL; longer than `MAX_SOUND_SECONDS`, it is cut.
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
