"""Options about training data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..options import option


@dataclass
class DataOptions:
    """Data

    Raises:
        ValueError: if options contradict each other; the message names them.
    """

    train_file: list[str] = option(
        [], "Training data: JSONL, .tar (WebDataset) or .parquet files, or globs of them ('data/*.tar')."
    )
    train_weight: list[float] = option([], "How often the rows of each --train_file are seen in an epoch (default 1).")
    validation_file: list[str] = option([], "Validation data, one or several, each FILE or NAME=FILE.")
    streaming: bool = option(
        False, "Read training data on the way, without a cache and a list of all rows; needs --max_steps."
    )
    shuffle_buffer: int = option(
        2000, "Rows that each worker holds, sorts into batches and shuffles at a time, with --streaming."
    )
    audio_root: str | None = option(None, "Folder that recordings of a JSONL must lie in (default: anywhere).")
    url_max_megabytes: float | None = option(None, "The largest recording to download (default 1000).")
    url_timeout_seconds: float | None = option(None, "The longest download of a recording (default 600).")
    allow_private_redirects: bool | None = option(
        None, "Whether URLs may redirect to private, loopback and link-local addresses (default: no)."
    )
    feature_cache: str = option("float16", "Cached fbank: float16, float32, or off (computed in every epoch).")
    cache_level: str = option(
        "auto",
        "What is cached: fbank, or what frozen parts make of it: encoder or adaptor; auto: the deepest, for more than "
        "one epoch.",
    )
    cache_dir: str | None = option(None, "Where datasets keeps its caches (default: that of datasets).")
    preprocessing_num_workers: int | None = option(None, "Processes that compute features (default: all cores).")
    spec_augment: bool = option(False, "Mask stripes of the training spectrograms.")
    tempo_perturb: float = option(0.0, "Stretch training recordings by up to this share, e.g. 0.1: 90 to 110 percent.")
    dither: float = option(
        0.0, "Noise added to training recordings, in 16-bit steps (the original's: 1.0); needs --feature_cache off."
    )
    # Without these options, rows have the hotwords that they carry.
    hotword_file: str | None = option(
        None,
        "Words, one in each line: hotwords of the rows that say them and carry none, distractors elsewhere (default: "
        "distractors are the hotwords of other rows and, with --hotwords_from_text, phrases of their transcripts).",
    )
    hotword_distractors: int = option(0, "The most hotwords that a training row gets besides its own; 0 to this.")
    hotword_dropout: float = option(0.0, "Share of training rows that get no hotwords at all.")
    hotwords_from_text: float = option(
        0.0, "Share of training rows without hotwords that get one: a phrase of their own transcript."
    )

    def __post_init__(self):
        self._check_files()
        if self.shuffle_buffer < 1:
            raise ValueError(f"--shuffle_buffer is {self.shuffle_buffer}; it must be at least 1")
        if self.feature_cache not in ("float16", "float32", "off"):
            raise ValueError(f"--feature_cache is {self.feature_cache!r}; choose float16, float32 or off")
        if self.dither < 0:
            raise ValueError(f"--dither is {self.dither}; it must be at least 0")
        if self.dither and self.feature_cache != "off" and not self.streaming:
            raise ValueError(
                f"--dither {self.dither:g} with --feature_cache {self.feature_cache} would add the same noise in "
                "every epoch; set --feature_cache off"
            )
        if not 0 <= self.tempo_perturb < 1:
            raise ValueError(f"--tempo_perturb is {self.tempo_perturb}; it must be at least 0 and below 1")
        self._check_hotwords()

    def _check_files(self) -> None:
        if self.train_weight and len(self.train_weight) != len(self.train_file):
            raise ValueError(
                f"--train_weight has {len(self.train_weight)} numbers for {len(self.train_file)} files of --train_file"
            )
        if len(set(self.train_file)) < len(self.train_file):
            raise ValueError("--train_file names a file twice; give it once, with a higher --train_weight")
        if any(weight <= 0 for weight in self.train_weight):
            raise ValueError("--train_weight must be above 0; leave the file out instead")

    def _check_hotwords(self) -> None:
        if self.hotword_distractors < 0:
            raise ValueError(f"--hotword_distractors is {self.hotword_distractors}; it must be at least 0")
        for name in ("hotword_dropout", "hotwords_from_text"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"--{name} is {value:g}; it must be between 0 and 1")
        if self.hotword_distractors and self.streaming and self.hotword_file is None:
            raise ValueError(
                "--hotword_distractors are drawn from all training rows, which --streaming does not know; give "
                "--hotword_file"
            )

    def validation_files(self) -> dict[str, str]:
        """Validation files by name; one without a name is called after the file.

        Raises:
            ValueError: if two have the same name.
        """
        named: dict[str, str] = {}
        for item in self.validation_file:
            name, found, path = item.partition("=")
            if not found:
                name, path = Path(item).stem, item
            if name in named:
                raise ValueError(f"two files of --validation_file are called {name!r}; name them: NAME=FILE")
            named[name] = path
        return named
