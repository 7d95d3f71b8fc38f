"""Checks of one recording. Each takes the measurement and the threshold, and returns a detail if there is a fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .kinds import KINDS
from .measurement import Measurement

RecordingCheck = Callable[[Measurement, float], str | None]

MIN_SECONDS = 0.5  # shorter recordings have too few frames to tell a steady signal from a vowel
# For `clipped`: at most 0.38 in 5,000 real recordings, at least 0.37 if overdriven by 20 dB and coded with Vorbis.
FLAT_TOP = 0.4
FLATTER_TOP, OVERSHOOT = 0.3, 1.1  # the same if lossy coding of flat waves has raised the peak above full scale
LOUD_TONE = -10.0  # dB relative to the loudest frames: a sine has flat waves without clipping
# In shorter recordings, a vowel may last from start to end: at most -15.6 dB in 2,000 spoken digits.
TONE_SECONDS, SHORT_TONE = 1.03, -13.0
LOW_TONE, LOW_TONE_MARGIN = 70.0, 8.0  # Hz below the lowest voices, and dB by which hum is found better there


def check_recording(measurement: Measurement, max_seconds: float | None = None) -> Iterator[tuple[str, str]]:
    """Yields kinds and details of all faults of a recording.

    Args:
        measurement: of the recording.
        max_seconds: longest recording that the model accepts; default: the threshold of `too-long`.
    """
    if measurement.error is not None:
        yield _unreadable(measurement.error), measurement.error
        return
    if measurement.peak < 10 ** ((KINDS["silent"].limit or 0) / 20):
        yield "silent", "all samples are 0" if not measurement.peak else f"largest sample {measurement.peak:.1e}"
        return
    for kind, check in RECORDING_CHECKS.items():
        limit = KINDS[kind].limit or 0.0
        if kind == "too-long" and max_seconds is not None:
            limit = max_seconds
        if (detail := check(measurement, limit)) is not None:
            yield kind, detail


def _unreadable(error: str) -> str:
    if "no such file" in error:
        return "missing-recording"
    if "maximum is" in error and error.startswith("length of"):
        return "too-long"
    if error.endswith("correct the times"):
        return "wrong-times"
    return "truncated-recording" if "truncated" in error else "unreadable-recording"


def _too_short(m: Measurement, limit: float) -> str | None:
    return f"{m.seconds:.3f} s" if m.seconds < limit else None


def _too_long(m: Measurement, limit: float) -> str | None:
    return f"{m.seconds:.1f} s; at most {limit:.0f} s" if m.seconds > limit else None


def _long(m: Measurement, limit: float) -> str | None:
    return f"{m.seconds:.1f} s" if m.seconds > limit else None


def _low_level(m: Measurement, limit: float) -> str | None:
    return f"level {m.level:.0f} dBFS" if m.level < limit else None


def _no_speech(m: Measurement, limit: float) -> str | None:
    if m.speech_probability is None or m.speech_probability >= limit:
        return None
    return f"highest speech probability {m.speech_probability:.2f}, level {m.level:.0f} dBFS"


def _steady(m: Measurement, limit: float) -> str | None:
    if m.spread >= limit or m.seconds < MIN_SECONDS:
        return None
    return f"levels differ by {m.spread:.1f} dB: a tone or noise"


def _white(m: Measurement, limit: float) -> str | None:
    return f"spectral flatness {m.flatness:.2f}" if m.flatness > limit else None


def _long_silence(m: Measurement, limit: float) -> str | None:
    places = {"at the start": m.lead, "at the end": m.tail, "inside": m.pause}
    found = [f"{seconds:.1f} s {place}" for place, seconds in places.items() if seconds > limit]
    return f"no speech for {', '.join(found)}" if found else None


def _clipped(m: Measurement, limit: float) -> str | None:
    if m.clipped > limit:
        return f"{m.clipped:.1%} of the samples in flat runs at {m.peak:.2f}"
    flat = m.flat_top > (FLATTER_TOP if m.peak > OVERSHOOT else FLAT_TOP)
    if flat and m.seconds >= MIN_SECONDS and not _is_tone(m):
        return f"flat waves: {m.flat_top:.0%} of the samples near the peak of their frame"
    return None


def _is_tone(m: Measurement) -> bool:
    return m.tone is not None and m.tone[1] - m.level > LOUD_TONE


def _offset(m: Measurement, limit: float) -> str | None:
    return f"mean {m.offset:+.3f} of full scale" if abs(m.offset) > limit else None


def _hum(m: Measurement, limit: float) -> str | None:
    if m.tone is None:
        return None
    frequency, level = m.tone
    margin = LOW_TONE_MARGIN if frequency < LOW_TONE else 0.0
    if level - m.level < (limit - margin if m.seconds >= TONE_SECONDS else SHORT_TONE):
        return None
    return f"{frequency:.0f} Hz at {level:.0f} dBFS, {m.level - level:.0f} dB below speech"


def _dropouts(m: Measurement, limit: float) -> str | None:
    if m.gaps < limit:
        return None
    return f"{m.gaps} gap{'s' if m.gaps > 1 else ''} inside sound, {1000 * m.gap_seconds:.0f} ms together"


def _repeated(m: Measurement, limit: float) -> str | None:
    if m.repeated <= limit or _is_tone(m):
        return None
    return f"{1000 * m.repeated:.0f} ms are repeated exactly"


def _dead_channel(m: Measurement, limit: float) -> str | None:
    return f"channel {m.dead_channel} of {m.channels} has no signal" if m.dead_channel else None


def _inverted(m: Measurement, limit: float) -> str | None:
    if m.correlation is None or m.correlation > limit:
        return None
    return f"correlation of the channels {m.correlation:.2f}"


def _unrelated(m: Measurement, limit: float) -> str | None:
    if m.similarity is None or m.similarity > limit:
        return None
    return f"largest correlation of the channels {m.similarity:.2f}"


def _narrow(m: Measurement, limit: float) -> str | None:
    if m.bandwidth is None or m.rate < 16000 or m.bandwidth > limit:
        return None
    return f"nothing above {m.bandwidth / 1000:.1f} kHz in a file with {m.rate / 1000:g} kHz"


def _reduced(m: Measurement, limit: float) -> str | None:
    narrow = KINDS["narrow-band"].limit or 0.0
    if m.bandwidth is None or m.rate < 16000 or not narrow < m.bandwidth <= limit:
        return None
    return f"nothing above {m.bandwidth / 1000:.1f} kHz in a file with {m.rate / 1000:g} kHz"


# A new check is one entry here, and its threshold one entry of `KINDS`.
RECORDING_CHECKS: dict[str, RecordingCheck] = {
    "too-short": _too_short,
    "too-long": _too_long,
    "long-recording": _long,
    "low-level": _low_level,
    "no-speech": _no_speech,
    "steady-signal": _steady,
    "white-noise": _white,
    "long-silence": _long_silence,
    "clipped": _clipped,
    "dc-offset": _offset,
    "hum": _hum,
    "dropouts": _dropouts,
    "repeated-sound": _repeated,
    "dead-channel": _dead_channel,
    "inverted-channel": _inverted,
    "unrelated-channels": _unrelated,
    "narrow-band": _narrow,
    "reduced-band": _reduced,
}
