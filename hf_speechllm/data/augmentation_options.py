"""Options of augmentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..options import option

ROOMS = "simulated"  # value of --reverb_source
BABBLE = "babble"  # value of --noise_source
GENERATED = ("white", "pink", BABBLE, ROOMS)  # sources that are not folders
# Probabilities of the transforms of waveforms, and the options that have no effect without these.
WAVEFORM_OPTIONS: dict[str, tuple[str, ...]] = {
    "speed_prob": ("speed_factors",),
    "reverb_prob": ("reverb_source", "reverb_seconds"),
    "noise_prob": ("noise_source", "noise_snr"),
    "gain_prob": ("gain_db",),
    "telephone_prob": (),
    "codec_prob": ("codec_kbps",),
}
WAVEFORM_NAMES = frozenset({*WAVEFORM_OPTIONS, *sum(WAVEFORM_OPTIONS.values(), ())})
RANGES = {  # of options with a smallest and a largest value; rooms with a longer reverberation need gigabytes
    "reverb_seconds": (0.1, 1.0), "noise_snr": (-40.0, 80.0), "gain_db": (-60.0, 60.0), "codec_kbps": (6.0, 160.0),
}  # fmt: skip
SPEEDS = (0.5, 2.0)


@dataclass
class AugmentationOptions:
    """Augmentation of training recordings

    The transforms of waveforms are applied in the order of the options. Validation and decoding are never augmented.

    Raises:
        ValueError: if an option is invalid; the message names the option.
    """

    speed_prob: float = option(0.0, "Share of recordings with another speed and pitch, in every epoch.")
    speed_factors: list[float] = option([0.9, 1.1], "With --speed_prob: speeds to choose from; 1.1: 10 % faster.")
    reverb_prob: float = option(0.0, "Share of recordings with reverberation, in every epoch.")
    reverb_source: list[str] = option(
        [ROOMS],
        "With --reverb_prob: 'simulated' rooms (needs pyroomacoustics), folders of impulse responses, or both.",
    )
    reverb_seconds: list[float] = option(
        [0.2, 0.6], "With --reverb_prob: smallest and largest reverberation time (RT60) of simulated rooms."
    )
    noise_prob: float = option(0.0, "Share of recordings with added noise, in every epoch.")
    noise_source: list[str] = option(
        ["white", "pink", BABBLE],
        "With --noise_prob: any of white, pink, babble (mixed from training recordings), and folders of recordings.",
    )
    noise_snr: list[float] = option(
        [5.0, 20.0], "With --noise_prob: smallest and largest signal-to-noise ratio in dB."
    )
    gain_prob: float = option(0.0, "Share of recordings with another level, in every epoch.")
    gain_db: list[float] = option([-18.0, 6.0], "With --gain_prob: smallest and largest change of the level in dB.")
    telephone_prob: float = option(
        0.0, "Share of recordings that are limited to the telephone band (8 kHz, G.711), in every epoch."
    )
    codec_prob: float = option(0.0, "Share of recordings that are compressed with Opus or MP3, in every epoch.")
    codec_kbps: list[float] = option([12.0, 32.0], "With --codec_prob: smallest and largest bit rate in kbit/s.")
    spec_augment: bool = option(False, "Apply SpecAugment: mask time and frequency bands of training spectrograms.")
    tempo_perturb: float = option(0.0, "Stretch training recordings by up to this share; 0.1: 90 to 110 percent.")
    dither: float = option(
        0.0, "Noise added to training recordings, in 16-bit steps (original: 1.0); needs --feature_cache off."
    )

    def __post_init__(self):
        if not 0 <= self.dither < float("inf"):
            raise ValueError(f"--dither is {self.dither}; it must be at least 0")
        if not 0 <= self.tempo_perturb < 1:
            raise ValueError(f"--tempo_perturb is {self.tempo_perturb}; it must be at least 0 and below 1")
        defaults = {
            item.name: item.default_factory for item in fields(AugmentationOptions) if callable(item.default_factory)
        }
        for name, details in WAVEFORM_OPTIONS.items():
            probability = getattr(self, name)
            if not 0 <= probability <= 1:
                raise ValueError(f"--{name} is {probability:g}; it must be between 0 and 1")
            for detail in details:
                if not probability and list(getattr(self, detail)) != defaults[detail]():
                    raise ValueError(f"--{detail} has no effect without --{name}; set --{name}, for example 0.5")
        for name, (least, most) in RANGES.items():
            values = getattr(self, name)
            if len(values) != 2 or not least <= values[0] <= values[1] <= most:
                raise ValueError(
                    f"--{name} is {_text(values)}; give the smallest and the largest value, from {least:g} to {most:g}"
                )
        if not self.speed_factors or not all(SPEEDS[0] <= factor <= SPEEDS[1] for factor in self.speed_factors):
            raise ValueError(f"--speed_factors is {_text(self.speed_factors)}; give numbers from 0.5 to 2")
        for name in ("noise_source", "reverb_source"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is empty; name at least one source")

    @property
    def changes_waveforms(self) -> str | None:
        """The first option in use that changes waveforms, with its value; `None` without such an option."""
        return self._first_of(*WAVEFORM_OPTIONS, "dither")

    @property
    def changes_features(self) -> str | None:
        """The first option in use, with its value; `None` without augmentation."""
        return self._first_of(*WAVEFORM_OPTIONS, "dither", "tempo_perturb", "spec_augment")

    def _first_of(self, *names: str) -> str | None:
        return next((f"--{name} {getattr(self, name)}" for name in names if getattr(self, name)), None)

    @property
    def largest_stretch(self) -> float:
        """Factor by which `--speed_factors` lengthens a recording at most."""
        return max(1.0, 1 / min(self.speed_factors)) if self.speed_prob else 1.0


def source_folders(options: Mapping[str, Any]) -> list[str]:
    """Returns the folders of noises and impulse responses that options use."""
    used = [name for kind in ("noise", "reverb") if options.get(f"{kind}_prob") for name in options[f"{kind}_source"]]
    return [name for name in used if name not in GENERATED]


def _text(values: list) -> str:
    return " ".join(f"{value:g}" for value in values) or "empty"
