import os
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithConfigurations(build_py):
    """Copies the YAML configurations into the package, so that whoever installs the wheel needs no checkout."""

    def run(self):
        super().run()
        if self.editable_mode:  # a checkout has them
            return
        for folder in ("recipes/configs", "accelerate_configs"):
            shutil.copytree(folder, Path(self.build_lib, "hf_speechllm", folder), dirs_exist_ok=True)


# CI runs both ends of each range: the oldest versions (tools/oldest.txt) with the core tests, the newest with all.
# An upper bound stands where a release can break this package. CONTRIBUTING.md says how to move a bound.
# What loads a model and decodes; a pushed model's code asks for these.
DECODE = [
    "torch>=2.11.0,<2.16",  # 2.15.0: all tests, run by hand on 2026-11-29
    "torchaudio>=2.11.0",
    "transformers>=5.18.0,<5.25",
    "filelock>=3.16.0",
    "soundfile>=0.13.0",
    "av>=18.1.0",  # earlier releases crash on a damaged VOC file
    "pyyaml>=6.0.2",
    "tqdm>=4.66.3",
    "rich>=13.8.0",  # tables and summaries on terminals; transformers needs it too
    "regex>=2025.10.22",
]
EVALUATE = [
    "compute-wer>=0.2.4",
    "rapidfuzz>=3.10.0",
    "jinja2>=3.1.4",
    "whisper-normalizer>=0.1.13",
    "zhconv>=1.4.3",
    "evaluate>=0.4.6",
]
TRAIN = [
    "accelerate>=1.12.0,<1.16",
    "datasets>=4.4.0,<5.3",
    "peft>=0.20.0,<0.22",
    "tensorboard>=2.18.0",
    "matplotlib>=3.9.2",
    *EVALUATE,  # validation by decoding
]
VAD = ["silero-vad[onnx-cpu]>=6.2.3"]
EVERYTHING = [*TRAIN, *VAD]
DEEPSPEED = "deepspeed>=0.19.8,<0.20; sys_platform == 'linux'"
VOXTRAL = "mistral-common[soundfile]>=1.11.5"  # what transformers asks for; limits numpy
LHOTSE = "lhotse>=1.33"
AUGMENT = "pyroomacoustics>=0.10.1"
DEMO = "gradio>=6.31,<7"
COMPLETION = "shtab>=1.13"
DOCS = ["mkdocs-material>=9.7,<10", "mkdocstrings[python]>=1.0", "codespell>=2.4"]
TEST = [*EVERYTHING, LHOTSE, AUGMENT, COMPLETION, DEMO, "pytest", "pytest-timeout", "pytest-xdist", "hypothesis"]

setup(
    name="hf_speechllm",
    version="0.2.0",
    description="Fine-tune speech LLMs (Fun-ASR-Nano and others) on the Hugging Face stack",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)),
        "Topic :: Multimedia :: Sound/Audio :: Speech",
    ],
    packages=find_packages(include=["hf_speechllm", "hf_speechllm.*"]),
    py_modules=["hf_speechllm_command"],
    entry_points={"console_scripts": ["hf-speechllm = hf_speechllm_command:main"]},
    cmdclass={"build_py": BuildWithConfigurations},
    package_data={
        "hf_speechllm.evaluation": ["report.html", "mixed_error_rate/*.py"],
        "hf_speechllm.diagnosis": ["page.html"],
    },
    install_requires=[*DECODE, *(EVERYTHING if os.environ.get("HF_SPEECHLLM_EDITABLE") else [])],
    # A wheel asks for what decoding needs; an editable install (tools/build_backend.py) for what all recipes need.
    extras_require={
        "decode": DECODE,
        "train": TRAIN,
        "eval": EVALUATE,
        "vad": VAD,
        "all": EVERYTHING,
        "deepspeed": [DEEPSPEED],
        "augment": [AUGMENT],  # simulated rooms for augmentation
        "lhotse": [LHOTSE],  # `prepare` of lhotse's manifests and Shar
        "voxtral": [VOXTRAL],  # prompts of Voxtral
        "completion": [COMPLETION],  # completion of the command in shells
        "demo": [DEMO, *VAD],  # page of `hf-speechllm demo`
        "funasr": ["funasr>=1.4"],  # the original, to test exports and numbers against
        "test": TEST,
        "docs": DOCS,
        "dev": [*TEST, *DOCS, DEEPSPEED, "ruff", "mypy", "import-linter", "pre-commit"],
    },
)
