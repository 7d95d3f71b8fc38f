"""Fine-tune speech LLMs (audio encoder, adaptor, causal LLM) on the Hugging Face stack."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .audio.fbank import FbankFeatureExtractor
    from .audio.waveform import load_audio
    from .data.augmentation_options import AugmentationOptions
    from .data.columns import prepare_dataset
    from .evaluation.normalizers import normalize_text
    from .formats.composition import compose, train_tokenizer
    from .inference.transcriber import Transcriber
    from .model.configuration import AudioAdaptorConfig, SpeechLLMConfig
    from .model.modeling import SpeechLLMForConditionalGeneration
    from .model.processing import SpeechLLMProcessor
    from .training.arguments import SpeechLLMTrainingArguments
    from .training.trainer import SpeechLLMTrainer

__all__ = [
    "AudioAdaptorConfig",
    "AugmentationOptions",
    "FbankFeatureExtractor",
    "SpeechLLMConfig",
    "SpeechLLMForConditionalGeneration",
    "SpeechLLMProcessor",
    "SpeechLLMTrainer",
    "SpeechLLMTrainingArguments",
    "Transcriber",
    "compose",
    "load_audio",
    "normalize_text",
    "prepare_dataset",
    "train_tokenizer",
]

_HOMES = {
    "AudioAdaptorConfig": "model.configuration",
    "AugmentationOptions": "data.augmentation_options",
    "FbankFeatureExtractor": "audio.fbank",
    "SpeechLLMConfig": "model.configuration",
    "SpeechLLMForConditionalGeneration": "model.modeling",
    "SpeechLLMProcessor": "model.processing",
    "SpeechLLMTrainer": "training.trainer",
    "SpeechLLMTrainingArguments": "training.arguments",
    "Transcriber": "inference.transcriber",
    "compose": "formats.composition",
    "load_audio": "audio.waveform",
    "normalize_text": "evaluation.normalizers",
    "prepare_dataset": "data.columns",
    "train_tokenizer": "formats.composition",
}


def __getattr__(name: str) -> Any:
    """Imports a public name at first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# This import registers the classes with the Auto classes. The command line skips it, so `--help` does not load torch.
_started_by_python = sys.argv[:1] == ["-m"] and __name__ in sys.orig_argv
if "hf_speechllm_command" not in sys.modules and not _started_by_python:
    from .model import modeling, processing  # noqa: F401
