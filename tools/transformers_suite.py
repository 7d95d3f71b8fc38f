"""Runs the common tests of transformers (`ModelTesterMixin`, `GenerationTesterMixin`, `ProcessorTesterMixin`) on our
classes.

The script uses the tests of the installed release. It downloads the source distribution with pip, which contains the
tests of models and processors. Only a clone of the repository contains the tests of `generate`; `--tests` names it.

    pip install pytest parameterized pillow
    python tools/transformers_suite.py [--tests CLONE/tests] [options of pytest, such as -k NAME]
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tarfile
import tempfile
import types
import unittest
from pathlib import Path

import pytest
import torch
import transformers

from hf_speechllm import FbankFeatureExtractor, SpeechLLMConfig, SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.formats.composition import train_tokenizer

# Tests that do not apply to these classes, with the reason.
SKIPPED: dict[str, str] = {}
AUDIO_TOKEN_ID, AUDIO_TOKENS = 3, 4


def download_tests(folder: Path) -> Path:
    """Downloads the source distribution of the installed release and unpacks its tests."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
    subprocess.run([*command, "--dest", folder, f"transformers=={transformers.__version__}"], check=True)
    with tarfile.open(next(folder.glob("transformers-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("transformers-*/tests"))


def import_tests(tests: Path) -> tuple[type, type, type]:
    """Imports the three mixins; replaces a missing mixin with an empty class."""
    sys.path.insert(0, str(tests.parent))
    package = types.ModuleType("tests")
    package.__path__ = [str(tests)]  # not the tests of this project
    sys.modules["tests"] = package
    for name, attributes in {
        "tests.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
        "tests.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
        "fetch_hub_objects_for_ci": {"url_to_local_path": lambda url: url},
    }.items():
        try:
            importlib.import_module(name)
        except ImportError:
            print(f"{tests} has no {name}: its tests do not run")
            for parent in [name.rpartition(".")[0]] if "." in name else []:
                sys.modules[parent] = types.ModuleType(parent)
            sys.modules[name] = types.ModuleType(name)
            vars(sys.modules[name]).update(attributes)
    return (
        importlib.import_module("tests.test_modeling_common").ModelTesterMixin,
        importlib.import_module("tests.generation.test_utils").GenerationTesterMixin,
        importlib.import_module("tests.test_processing_common").ProcessorTesterMixin,
    )


class ModelTester:
    """Makes a tiny model and a batch for the mixins."""

    batch_size, seq_length, num_hidden_layers, num_attention_heads, hidden_size = 3, 11, 2, 2, 32
    is_training = True

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self) -> SpeechLLMConfig:
        """Returns the configuration of a tiny Fun-ASR-Nano."""
        return SpeechLLMConfig(
            audio_encoder_config={
                "model_type": "fun_asr_nano_encoder", "hidden_size": 32, "num_attention_heads": 2,
                "intermediate_size": 48, "num_hidden_layers": 2, "num_timestamp_prediction_layers": 1,
            },
            audio_adaptor_config={"projector_hidden_size": 40, "num_attention_heads": 4, "num_hidden_layers": 1},
            llm_config={
                "model_type": "qwen3", "vocab_size": 99, "hidden_size": self.hidden_size, "intermediate_size": 48,
                "num_hidden_layers": self.num_hidden_layers, "num_attention_heads": self.num_attention_heads,
                "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512,
                "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            },
            audio_token_id=AUDIO_TOKEN_ID,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self) -> tuple[SpeechLLMConfig, dict[str, torch.Tensor]]:
        """Returns the configuration and a batch with one recording in each row."""
        ids = torch.randint(AUDIO_TOKEN_ID + 1, 80, (self.batch_size, self.seq_length))
        ids[:, 2 : 2 + AUDIO_TOKENS] = AUDIO_TOKEN_ID
        return self.get_config(), {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "input_features": torch.randn(self.batch_size, AUDIO_TOKENS, 560),
            "input_features_mask": torch.ones(self.batch_size, AUDIO_TOKENS, dtype=torch.long),
        }


def make_tests(model_mixin: type, generation_mixin: type, processor_mixin: type) -> dict[str, type]:
    """Makes the test classes."""

    class SpeechLLMModelTest(model_mixin, generation_mixin, unittest.TestCase):
        all_model_classes = (SpeechLLMForConditionalGeneration,)
        _is_composite = True

        def setUp(self):
            self.model_tester = ModelTester(self)

    class SpeechLLMProcessorTest(processor_mixin, unittest.TestCase):
        processor_class = SpeechLLMProcessor

        @classmethod
        def _setup_feature_extractor(cls):
            return FbankFeatureExtractor()

        @classmethod
        def _setup_tokenizer(cls):
            return train_tokenizer(["lower newer upper older longer string"], vocab_size=300)

    return {test.__name__: test for test in (SpeechLLMModelTest, SpeechLLMProcessorTest)}


class Suite:
    """Pytest plugin: collects the test classes and skips the tests in `SKIPPED`."""

    def __init__(self, tests: dict[str, type]):
        self.tests = tests

    def pytest_collectstart(self, collector: pytest.Collector) -> None:
        """Adds the classes to this module, where pytest collects them."""
        if isinstance(collector, pytest.Module):
            vars(collector.obj).update(self.tests)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Skips the tests in `SKIPPED`, with their reasons."""
        for item in items:
            if reason := SKIPPED.get(item.name):
                item.add_marker(pytest.mark.skip(reason=reason))


def main() -> int:
    """Runs the tests; returns the exit status of pytest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, help="folder `tests` of transformers (default: downloaded)")
    options, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        tests = make_tests(*import_tests(options.tests or download_tests(Path(folder))))
        arguments = [__file__, "--import-mode=importlib", "-q", "-p", "no:cacheprovider", *rest]
        return pytest.main(arguments, plugins=[Suite(tests)])


if __name__ == "__main__":
    sys.exit(main())
