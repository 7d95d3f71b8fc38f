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


setup(
    name="hf_speechllm",
    version="0.2.0",
    description="Fine-tune speech LLMs (Fun-ASR-Nano and others) on the Hugging Face stack",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["hf_speechllm", "hf_speechllm.*"]),
    py_modules=["hf_speechllm_command"],
    entry_points={"console_scripts": ["hf-speechllm = hf_speechllm_command:main"]},
    cmdclass={"build_py": BuildWithConfigurations},
    package_data={"hf_speechllm.evaluation": ["report.html", "mixed_error_rate/*.py"]},
    install_requires=[
        "torch>=2.9",
        "torchaudio>=2.9",
        "transformers>=5.17",
        "accelerate>=1.12",
        "datasets>=4.4",
        "peft>=0.18",
        "evaluate",
        "filelock",
        "soundfile",
        "av",
        "pyyaml",
        "tqdm",
        "matplotlib",
        "tensorboard",
        "silero-vad[onnx-cpu]>=6.2.3",
        "compute-wer",
        "rapidfuzz",
        "jinja2",
        "jiwer",
        "whisper-normalizer",
        "zhconv",
    ],
    extras_require={
        "deepspeed": ["deepspeed>=0.19.8"],
        "funasr": ["funasr>=1.4"],  # the original, to test exports and numbers against
        "dev": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "deepspeed>=0.19.8",
            "ruff",
            "mypy",
            "pre-commit",
        ],
    },
)
