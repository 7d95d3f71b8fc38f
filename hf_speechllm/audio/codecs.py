"""Round trips through lossy codecs (FFmpeg, through PyAV)."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from .resampling import resample

# Container and rate in Hz of each encoder. The containers store the encoder's delay, which the decoder then removes.
ENCODERS = {
    "libopus": ("ogg", 16000),
    "libmp3lame": ("mp3", 16000),
    "pcm_mulaw": ("wav", 8000),  # G.711 mu-law
    "pcm_alaw": ("wav", 8000),  # G.711 A-law
}


def round_trip(waveform: np.ndarray, sampling_rate: int, encoder: str, kbps: float | None = None) -> np.ndarray:
    """Encodes and decodes a waveform at the rate of the encoder, without a change of length or alignment.

    Args:
        waveform: float32, shape = (samples,), in [-1, 1].
        sampling_rate: rate of the waveform in Hz.
        encoder: key of `ENCODERS`.
        kbps: bit rate in kbit/s, for Opus and MP3; LAME uses the nearest standard bit rate.

    Returns:
        float32, shape = (samples,).
    """
    import av

    container_format, rate = ENCODERS[encoder]
    samples = resample(waveform, sampling_rate, rate)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container_format) as output:
        stream: Any = output.add_stream(encoder, rate=rate, layout="mono")
        if kbps is not None:
            stream.bit_rate = round(1000 * kbps)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples)[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    buffer.seek(0)
    resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
    with av.open(buffer) as encoded:
        frames = [part for frame in encoded.decode(audio=0) for part in resampler.resample(frame)]
        frames += resampler.resample(None)
    decoded = np.concatenate([frame.to_ndarray().reshape(-1) for frame in frames])
    return fit_length(resample(decoded, rate, sampling_rate), len(waveform))


def fit_length(waveform: np.ndarray, samples: int) -> np.ndarray:
    """Cuts a waveform at the end, or pads the end with zeros, to a number of samples."""
    return np.pad(waveform[:samples], (0, max(0, samples - len(waveform))))
