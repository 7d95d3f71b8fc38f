"""Sources of noise and of room impulse responses for augmentation.

A source of noise is called with a number of samples and a random generator. It returns float32, shape = (samples,), at
any level, or `None` if no noise is available.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .resampling import resample
from .waveform import AUDIO_SUFFIXES, AudioError, load_audio, read_audio

logger = logging.getLogger(__name__)

CACHE_BYTES = 128 * 2**20  # decoded recordings of a folder per process: 35 minutes at 16 kHz
TALKERS = (3, 7)  # smallest and largest number of talkers of a babble, as in Kaldi's MUSAN recipes
NUM_ROOMS = 200  # simulated impulse responses; a process simulates each room at most once, in about 0.1 s
ROOM_SIZES = ((3.0, 10.0), (3.0, 10.0), (2.5, 4.0))  # m: smallest and largest length, width and height
WALL_DISTANCE = 0.5  # m: smallest distance of source and microphone from the walls


def white_noise(samples: int, rng: np.random.Generator) -> np.ndarray:
    """Returns Gaussian noise with a flat spectrum."""
    return rng.standard_normal(samples, dtype=np.float32)


def pink_noise(samples: int, rng: np.random.Generator) -> np.ndarray:
    """Returns Gaussian noise whose power is inversely proportional to the frequency, without a constant offset."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    spectrum[0] = 0
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    return np.fft.irfft(spectrum, samples).astype(np.float32)


def excerpt(recording: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a random part of a recording; a recording that is too short is repeated, from a random start."""
    if len(recording) >= samples:
        start = int(rng.integers(len(recording) - samples + 1))
        return recording[start : start + samples]
    return np.resize(np.roll(recording, -int(rng.integers(len(recording)))), samples)


@dataclass
class Babble:
    """Mixes the speech of several random rows at equal levels.

    Args:
        sampling_rate: rate of the result in Hz.
        recordings: returns the recordings of a row, for `load_audio`.
        num_rows: number of rows; without rows, there is no babble.
    """

    sampling_rate: int
    recordings: Callable[[int], Sequence[Any]] | None = None
    num_rows: int = 0

    def __call__(self, samples: int, rng: np.random.Generator) -> np.ndarray | None:
        """Mixes excerpts; recordings without sound and unreadable ones, which training reports, are left out."""
        if self.recordings is None:
            raise ValueError("babble needs the training rows; call `use_training_rows` of the collator first")
        if not self.num_rows:
            return None
        mixture = np.zeros(samples, np.float32)
        for index in rng.integers(self.num_rows, size=rng.integers(TALKERS[0], TALKERS[1] + 1)):
            recordings = self.recordings(int(index))
            source = recordings[int(rng.integers(len(recordings)))]
            place = np.random.default_rng(rng.integers(2**63))  # so that an unreadable recording changes nothing else
            try:
                speech = excerpt(load_audio(source, self.sampling_rate), samples, place)
            except AudioError:
                continue
            if level := float(np.sqrt(np.mean(np.square(speech)))):
                mixture += speech / level
        return mixture if mixture.any() else None


@dataclass
class RecordingFolder:
    """Recordings of a folder and its subfolders, of any format and rate; uses the first channel.

    Keeps decoded recordings in memory, up to `CACHE_BYTES`. An unreadable or silent recording is reported once per
    process, and replaced by the next one.

    Args:
        folder: path.
        sampling_rate: rate of the results in Hz.

    Raises:
        ValueError: if the folder is missing or contains no readable recordings.
    """

    folder: str
    sampling_rate: int

    def __post_init__(self):
        if not os.path.isdir(self.folder):
            raise ValueError(f"{self.folder}: no such folder")
        self.files = recordings_in(self.folder)
        self._kept: OrderedDict[str, np.ndarray | None] = OrderedDict()
        self.random_recording(np.random.default_rng(0))  # an error if no recording is readable

    def __call__(self, samples: int, rng: np.random.Generator) -> np.ndarray:
        """Returns an excerpt of a random recording."""
        return excerpt(self.random_recording(rng), samples, rng)

    def random_recording(self, rng: np.random.Generator) -> np.ndarray:
        """Returns a random recording, float32, shape = (samples,)."""
        start = int(rng.integers(max(1, len(self.files))))
        for file in self.files[start:] + self.files[:start]:
            if (waveform := self._load(file)) is not None:
                return waveform
        raise ValueError(f"{self.folder}: no readable recordings ({', '.join(AUDIO_SUFFIXES)})")

    def _load(self, file: str) -> np.ndarray | None:
        if file in self._kept:
            self._kept.move_to_end(file)
            return self._kept[file]
        try:
            samples, rate = read_audio(file)
            waveform = resample(np.ascontiguousarray(samples[:, 0]), rate, self.sampling_rate)
            if not waveform.any():
                raise AudioError(f"{file}: only silence in the first channel")
        except AudioError as error:
            logger.warning("augmentation leaves out a recording: %s", error)
            waveform = None
        self._kept[file] = waveform
        while sum(item.nbytes for item in self._kept.values() if item is not None) > CACHE_BYTES:
            oldest = next(name for name, item in self._kept.items() if item is not None)
            del self._kept[oldest]
        return waveform


def recordings_in(folder: str) -> list[str]:
    """Returns the paths of all recordings in a folder and its subfolders, sorted."""
    found = [os.path.join(root, name) for root, _, names in os.walk(folder) for name in names]
    return sorted(path for path in found if path.lower().endswith(AUDIO_SUFFIXES))


@dataclass
class SimulatedRooms:
    """Impulse responses of random rectangular rooms (image source method of pyroomacoustics).

    Args:
        seconds: smallest and largest reverberation time (RT60) in seconds.
        sampling_rate: rate of the results in Hz.
    """

    seconds: tuple[float, float]
    sampling_rate: int

    def random_recording(self, rng: np.random.Generator) -> np.ndarray:
        """Returns an impulse response, float32, shape = (samples,)."""
        return simulate_room(int(rng.integers(NUM_ROOMS)), *self.seconds, self.sampling_rate)


@functools.lru_cache(maxsize=NUM_ROOMS)
def simulate_room(number: int, shortest: float, longest: float, sampling_rate: int) -> np.ndarray:
    """Simulates an impulse response in a random room; size, absorption and positions depend only on the arguments.

    Args:
        number: seed of the room.
        shortest, longest: range of the reverberation time (RT60) in seconds.
        sampling_rate: rate of the result in Hz.

    Returns:
        float32, shape = (samples,).
    """
    import pyroomacoustics

    rng = np.random.default_rng(number)
    while True:
        sizes = [rng.uniform(*limits) for limits in ROOM_SIZES]
        try:  # a large room cannot have a short reverberation time
            absorption, order = pyroomacoustics.inverse_sabine(rng.uniform(shortest, longest), sizes)
            break
        except ValueError:
            continue
    threads = pyroomacoustics.constants.get("num_threads")
    pyroomacoustics.constants.set("num_threads", 1)  # sums in another order have other rounding errors
    try:
        room = pyroomacoustics.ShoeBox(
            sizes, fs=sampling_rate, materials=pyroomacoustics.Material(absorption), max_order=order
        )
        for add in (room.add_source, room.add_microphone):
            add([rng.uniform(WALL_DISTANCE, size - WALL_DISTANCE) for size in sizes])
        room.compute_rir()
    finally:
        pyroomacoustics.constants.set("num_threads", threads)
    return np.asarray(room.rir[0][0], dtype=np.float32)
