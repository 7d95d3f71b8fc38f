"""Compose a new speech LLM from random or pretrained parts, and save model and processor.

# Tiny, from scratch, with a tokenizer trained on the transcripts
hf-speechllm compose models/tiny \\
    --transcripts recipes/quickstart_data/train/text --output_dir exp/tiny/init

# Whisper's encoder before a pretrained LLM
hf-speechllm compose models/linear_adaptor \\
    --audio_encoder openai/whisper-small --llm Qwen/Qwen3-0.6B --output_dir exp/whisper_qwen/init

The encoder may be part of a larger model (encoder-decoder, CTC, speech LLM); see docs/tutorials/own_model.md.
Prompts use the chat template of the LLM. --llm may also be a GGUF file (needs the package gguf).
"""

import argparse
import logging
import sys
from pathlib import Path

import yaml

from ..console import command, print_summary, quiet_transformers, show_log
from .configurations import TRAINING, find_configuration
from .parser import Parser, prog

logger = logging.getLogger(__name__)


def main() -> None:
    """Runs the command; see the docstring of the module."""
    parser = Parser(__doc__)
    parser.add_argument(
        "config",
        help="YAML file with the sizes of the parts, or a name: models/tiny, ...",
    )
    parser.add_argument("--output_dir", required=True, help="folder for the model; must not exist")
    parser.add_argument("--audio_encoder", help="pretrained encoder: folder or Hub id (default: random weights)")
    parser.add_argument("--llm", help="pretrained LLM: folder, Hub id or GGUF file (default: random weights)")
    parser.add_argument("--tokenizer", help="tokenizer: folder or Hub id (default: tokenizer of the LLM)")
    parser.add_argument(
        "--transcripts", nargs="+", help="lists to train a new tokenizer on: Kaldi text, JSONL, CSV, ..."
    )
    parser.add_argument("--vocab_size", type=int, default=400, help="vocabulary size of the new tokenizer")
    parser.add_argument("--seed", type=int, default=0, help="seed of random weights")
    args = parser.parse_args()
    if bool(args.transcripts) == bool(args.tokenizer or args.llm):
        parser.error("set either --transcripts (new tokenizer), or --tokenizer or --llm (existing tokenizer)")
    if Path(args.output_dir).exists():
        parser.file_error(f"{args.output_dir} exists; remove it or choose another --output_dir")
    for file in args.transcripts or ():
        if not Path(file).is_file():
            parser.file_error(f"--transcripts {file}: no such file")
    try:
        args.config = find_configuration(args.config, TRAINING)
    except ValueError as error:
        parser.error(str(error))
    show_log()
    try:
        compose_model(args)
    except (OSError, ValueError, yaml.YAMLError) as error:
        sys.exit(f"{prog()}: error: {' '.join(str(error).split())}")


def compose_model(args: argparse.Namespace) -> None:
    """Composes the model and saves it."""
    # Before the imports, so that errors in the file appear immediately.
    config = yaml.safe_load(args.config.read_text(encoding="utf-8"))

    from transformers import set_seed
    from transformers.utils import logging as transformers_logging

    from ..formats.composition import compose, train_tokenizer

    quiet_transformers()
    transformers_logging.set_verbosity_error()  # lists the weights of decoders, which are not used
    set_seed(args.seed)
    tokenizer = args.tokenizer or args.llm
    if args.transcripts:
        from ..data.corpus import read_texts

        texts = [text for file in args.transcripts for text in read_texts(file)]
        tokenizer = train_tokenizer(texts, args.vocab_size)
    model, processor = compose(config, tokenizer, args.audio_encoder, args.llm)
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    millions = {
        name: f"{sum(p.numel() for p in part.parameters()) / 1e6:.2f} M" for name, part in model.named_children()
    }
    train = command(
        "finetune", model_name_or_path=args.output_dir, train_file="data/train.jsonl",
        validation_file="data/dev.jsonl", output_dir="exp/model",
    )  # fmt: skip
    parts = ", ".join(f"{name} {size}" for name, size in millions.items())
    facts = {"parameters": parts, "vocabulary": len(processor.tokenizer), "model": args.output_dir}
    print_summary(facts, [train])
