"""Console command: runs a verb, and reports errors in one line."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from ..console import bars_as_lines
from ..version import __version__
from .parser import did_you_mean, prog, report

GROUPS = {
    "Data": {
        "prepare": "converts a corpus in any known layout to training JSONL",
        "scp2jsonl": "converts Kaldi lists to training JSONL",
        "doctor": "checks recordings and transcripts for faults",
        "inspect": "shows data as the model receives them: ids, labels, loss",
        "synthesize": "makes synthetic training speech with installed engines",
    },
    "Training": {
        "plan": "measures time and memory, and chooses a configuration",
        "finetune": "trains a model; --num_processes N starts N processes",
    },
    "Speech": {
        "decode": "transcribes recordings",
        "align": "finds the times of the words of given transcripts",
        "demo": "opens a page in the browser to try a model",
    },
    "Scores": {
        "normalize": "normalizes transcripts before scoring",
        "score": "computes error rates and writes a report",
    },
    "Models": {
        "compose": "composes a model from an audio encoder, adaptor and LLM",
        "convert": "converts a checkpoint between formats",
        "average": "averages checkpoints of a run",
        "merge": "merges LoRA adapters into the base model",
        "push": "publishes a model on the Hub",
    },
    "Help": {
        "env": "prints versions for bug reports",
        "completion": "prints a completion script for bash, zsh or fish",
    },
}
VERBS = {verb: description for group in GROUPS.values() for verb, description in group.items()}
# Extra that installs an optional package.
EXTRAS = {
    **dict.fromkeys(("accelerate", "datasets", "matplotlib", "peft", "pyarrow", "tensorboard"), "train"),
    **dict.fromkeys(("compute_wer", "evaluate", "jinja2", "rapidfuzz", "whisper_normalizer"), "eval"),
    "zhconv": "eval",
    "silero_vad": "vad",
    "lhotse": "lhotse",
    "pyroomacoustics": "augment",
    "gradio": "demo",
    "shtab": "completion",
}
SYNONYMS = {"train": "finetune", "transcribe": "decode", "evaluate": "score", "export": "convert"}


def main(verb: str | None = None) -> None:
    """Runs a verb with the other arguments of the command line.

    Args:
        verb: default the first argument of the command line.

    Raises:
        SystemExit: if the verb fails, or after printing help.
    """
    try:
        try:
            verb = verb or _verb(sys.argv[1:])
            with bars_as_lines():
                status = import_module(f".{verb}", __package__).main()
            if status is not None:
                sys.exit(status)
        finally:
            print(end="", flush=True)  # a reader that has ended is noticed here, not at exit
    except ModuleNotFoundError as error:
        if error.name == f"{__package__}.{verb}":  # the code in the repository of a published model
            sys.exit(f"{prog()}: error: this installation has decode and align only; pip install hf_speechllm")
        package = str(error.name).partition(".")[0]
        if package == __package__.partition(".")[0]:
            raise
        extra = f"[{EXTRAS[package]}]" if package in EXTRAS else ""
        sys.exit(f"{prog()}: error: the package {package} is missing; pip install 'hf_speechllm{extra}'")
    except ImportError as error:  # a library requires another library: attention kernels, quantization, trackers
        if str(error.name).partition(".")[0] == __package__.partition(".")[0]:
            raise
        sys.exit(f"{prog()}: error: {error}")
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise the exit flushes, and fails again
        sys.exit(1)
    except KeyboardInterrupt as interruption:
        report(f"{prog()}: interrupted{interruption}")
        sys.exit(130)


def _verb(argv: list[str]) -> str:
    if argv[:1] == ["--version"]:
        print(f"hf_speechllm {__version__}")
        sys.exit()
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: hf-speechllm VERB [--OPTION VALUE ...] (VERB --help: its options)\n")
        for title, group in GROUPS.items():
            for number, (verb, description) in enumerate(group.items()):
                print(f"{'' if number else title:<10}{verb:<12}{description}")
        sys.exit(0 if argv else 2)
    if argv[0] not in VERBS:
        hint = did_you_mean(SYNONYMS.get(argv[0], argv[0]), VERBS)
        report(f"hf-speechllm: error: unknown verb {argv[0]}{hint}; hf-speechllm --help lists all verbs")
        sys.exit(2)
    return argv[0]
