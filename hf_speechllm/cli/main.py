"""The console command: chooses the verb, and tells in one line what keeps it from working."""

from __future__ import annotations

import sys
from importlib import import_module

from ..version import __version__
from .parser import did_you_mean, prog

VERBS = {
    "scp2jsonl": "makes training JSONL of Kaldi lists",
    "inspect": "shows what the model sees of training data: ids, labels, loss",
    "finetune": "trains a model; --num_processes N starts N processes",
    "decode": "transcribes recordings",
    "normalize": "normalizes transcripts before scoring",
    "score": "computes error rates and writes a report",
    "compose": "joins an audio encoder, an adaptor and an LLM to a new model",
    "convert": "converts a checkpoint between formats",
    "average": "averages checkpoints of a run",
    "merge": "merges LoRA adapters into their model",
    "push": "publishes a model on the Hub",
    "env": "prints versions for bug reports",
}
# The extra that brings a package; those of every installation are not among them.
EXTRAS = {
    **dict.fromkeys(("accelerate", "datasets", "peft", "pyarrow", "tensorboard"), "train"),
    **dict.fromkeys(("compute_wer", "evaluate", "jinja2", "matplotlib", "rapidfuzz", "whisper_normalizer"), "eval"),
    "zhconv": "eval",
    "silero_vad": "vad",
}


def main(verb: str | None = None) -> None:
    """Runs a verb with the rest of the command line.

    Args:
        verb: default the first word of the command line.

    Raises:
        SystemExit: if the verb fails, or only help was wanted.
    """
    if verb is None:
        verb = _verb(sys.argv[1:])
    try:
        if (status := import_module(f".{verb}", __package__).main()) is not None:
            sys.exit(status)
    except ModuleNotFoundError as error:
        if error.name == f"{__package__}.{verb}":  # the code that a model was published with
            sys.exit(f"{prog()}: error: this installation only decodes; install hf_speechllm itself")
        package = str(error.name).partition(".")[0]
        if package == __package__.partition(".")[0]:
            raise
        extra = f"[{EXTRAS[package]}]" if package in EXTRAS else ""
        sys.exit(f"{prog()}: error: the package {package} is missing; pip install 'hf_speechllm{extra}'")
    except KeyboardInterrupt:
        print(f"{prog()}: interrupted", file=sys.stderr)
        sys.exit(130)


def _verb(argv: list[str]) -> str:
    if argv[:1] == ["--version"]:
        print(f"hf_speechllm {__version__}")
        sys.exit()
    if not argv or argv[0] in ("-h", "--help"):
        lines = (f"  {verb:<10} {does}" for verb, does in VERBS.items())
        print(
            "usage: hf-speechllm VERB [--OPTION VALUE ...]\n", *lines, "\nOptions: hf-speechllm VERB --help", sep="\n"
        )
        sys.exit(0 if argv else 2)
    if argv[0] not in VERBS:
        sys.exit(f"hf-speechllm: error: unknown verb {argv[0]}{did_you_mean(argv[0], VERBS)}; all verbs: --help")
    return argv[0]
