"""Options for training data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..options import option
from .augmentation_options import BABBLE, AugmentationOptions


@dataclass
class DataOptions(AugmentationOptions):
    """Data

    Raises:
        ValueError: if an option is invalid or options contradict each other; the message names them.
    """

    train_file: list[str] = option(
        [],
        "Training data: JSONL, .tar (WebDataset) or .parquet files, globs ('data/*.tar'), or other sources.",
    )
    train_weight: list[float] = option([], "Times per epoch that the rows of each --train_file are used (default: 1).")
    validation_file: list[str] = option([], "Validation data: one or several of FILE or NAME=FILE.")
    streaming: bool = option(
        False, "Read training data during training, without a cache or a list of all rows; needs --max_steps."
    )
    shuffle_buffer: int = option(
        2000, "With --streaming: rows per window, in which each worker builds and shuffles batches."
    )
    audio_root: str | None = option(None, "Folder that must contain all recordings of a JSONL (default: any folder).")
    url_max_megabytes: float | None = option(
        None, "Maximum size of a downloaded recording in megabytes (default: 1000)."
    )
    url_timeout_seconds: float | None = option(None, "Maximum duration of a download in seconds (default: 600).")
    allow_private_redirects: bool | None = option(
        None, "Allow redirects of URLs to private, loopback and link-local addresses (default: no)."
    )
    feature_cache: str = option(
        "float16", "Dtype of cached fbank features: float16, float32, or off (computed in every epoch)."
    )
    cache_level: str = option(
        "auto",
        "Cache stage: fbank, or outputs of frozen parts: encoder or adaptor; auto: the last possible stage, if there "
        "is more than one epoch.",
    )
    cache_dir: str | None = option(None, "Cache folder of datasets (default: the default of datasets).")
    preprocessing_num_workers: int | None = option(None, "Processes that compute features (default: all cores).")
    # Without these options, each row keeps its own hotwords.
    hotword_file: str | None = option(
        None,
        "List of words, one per line: hotwords of rows without hotwords whose transcript contains them, distractors "
        "of other rows (default: distractors are hotwords of other rows and, with --hotwords_from_text, phrases of "
        "their transcripts).",
    )
    hotword_distractors: int = option(
        0, "Maximum number of distractors per training row; the number is random from 0 to this."
    )
    hotword_dropout: float = option(0.0, "Share of training rows that get no hotwords.")
    hotwords_from_text: float = option(
        0.0, "Share of training rows without hotwords that get a phrase of their transcript as a hotword."
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_files()
        if self.shuffle_buffer < 1:
            raise ValueError(f"--shuffle_buffer is {self.shuffle_buffer}; it must be at least 1")
        if self.feature_cache not in ("float16", "float32", "off"):
            raise ValueError(f"--feature_cache is {self.feature_cache!r}; choose float16, float32 or off")
        self._check_augmentation()
        self._check_hotwords()

    def _check_files(self) -> None:
        if self.train_weight and len(self.train_weight) != len(self.train_file):
            raise ValueError(
                f"--train_weight has {len(self.train_weight)} numbers, but --train_file has {len(self.train_file)} "
                "files; give one number per file"
            )
        if len(set(self.train_file)) < len(self.train_file):
            raise ValueError("--train_file names a file twice; give it once, with a higher --train_weight")
        if any(weight <= 0 for weight in self.train_weight):
            raise ValueError("--train_weight must be above 0; leave the file out instead")

    def _check_augmentation(self) -> None:
        if (used := self.changes_waveforms) and self.feature_cache != "off" and not self.streaming:
            raise ValueError(
                f"{used} with --feature_cache {self.feature_cache} would repeat the same augmentation in every epoch; "
                "set --feature_cache off"
            )
        if self.streaming and self.noise_prob and BABBLE in self.noise_source:
            raise ValueError(
                "--noise_source babble needs all training rows, which are not available with --streaming; choose from "
                "white, pink and folders"
            )

    def _check_hotwords(self) -> None:
        if self.hotword_distractors < 0:
            raise ValueError(f"--hotword_distractors is {self.hotword_distractors}; it must be at least 0")
        for name in ("hotword_dropout", "hotwords_from_text"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"--{name} is {value:g}; it must be between 0 and 1")
        if self.hotword_distractors and self.streaming and self.hotword_file is None:
            raise ValueError(
                "--hotword_distractors needs all training rows, which are not available with --streaming; give "
                "--hotword_file"
            )

    def compute_features_per_epoch(self, model_type: str) -> None:
        """Sets the options for a native speech LLM, whose own processor computes the features of each batch.

        Raises:
            ValueError: if an option needs features of this package.
        """
        for name in ("spec_augment", "tempo_perturb", "dither", "hotword_distractors", "hotwords_from_text"):
            if getattr(self, name):
                raise ValueError(f"--{name} does not support {model_type} models; leave it out")
        if self.cache_level not in ("auto", "fbank"):
            raise ValueError(f"--cache_level {self.cache_level} does not support {model_type} models; leave it out")
        self.feature_cache = "off"

    def validation_files(self) -> dict[str, str]:
        """Returns validation files by name; the default name is the stem of the file.

        Raises:
            ValueError: if two files have the same name.
        """
        named: dict[str, str] = {}
        for item in self.validation_file:
            name, found, path = item.partition("=")
            if not found:
                name, path = Path(item).stem, item
            if name in named:
                raise ValueError(f"two files of --validation_file have the name {name!r}; give names: NAME=FILE")
            named[name] = path
        return named
