"""Show training data as the model receives them: token ids, supervised tokens, audio tokens, frames.

# The first 3 rows in colour: supervised tokens are green, audio tokens are a count
hf-speechllm inspect --model_name_or_path exp/model --jsonl_file data/train.jsonl --num_rows 3

# As JSON, one line per row, with the loss of the model
hf-speechllm inspect --model_name_or_path exp/model --jsonl_file data/train.jsonl --json --loss

# Recordings as training hears them, as WAV files in a folder; options as for finetune
hf-speechllm inspect --model_name_or_path exp/model --jsonl_file data/train.jsonl --save_audio heard --noise_prob 1

# Prompts of decoding
hf-speechllm inspect --model_name_or_path exp/model --jsonl_file data/test.jsonl --inference --language zh
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from ..console import quiet_transformers, show_log
from ..data.augmentation_options import AugmentationOptions
from .arguments import add_waveform_augmentation, waveform_augmentation_of
from .parser import Parser, prog

logger = logging.getLogger(__name__)

SEED = 42  # default of --seed in training
GREEN, GREY, CYAN, RESET = "\033[32m", "\033[90m", "\033[36m", "\033[0m"


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="model folder or Hub id")
    parser.add_argument("--jsonl_file", required=True, help="training rows")
    parser.add_argument("--num_rows", type=int, help="number of rows (default: 5; all with --json)")
    parser.add_argument("--json", action="store_true", help="print one JSON line per row")
    parser.add_argument("--loss", action="store_true", help="also print the loss of each row")
    parser.add_argument("--inference", action="store_true", help="print prompts of decoding, without answers")
    parser.add_argument("--language", help="with --inference: see hf-speechllm decode")
    parser.add_argument("--no_itn", action="store_true", help="with --inference: see hf-speechllm decode")
    parser.add_argument("--hotwords", help="with --inference: see hf-speechllm decode")
    parser.add_argument("--save_audio", metavar="DIR", help="write the augmented recordings of each row as WAV files")
    add_waveform_augmentation(parser, "Augmentation, with --save_audio")
    args = parser.parse_args()
    if args.inference and args.loss:
        parser.error("--loss requires answers, which --inference leaves out; use only one of the options")
    if (args.language or args.no_itn or args.hotwords) and not args.inference:
        parser.error("--language, --no_itn and --hotwords require --inference; training rows contain their prompts")
    args.augmentation = waveform_augmentation_of(args, parser)
    if args.augmentation != AugmentationOptions() and not args.save_audio:
        parser.error("options of augmentation have no effect without --save_audio; add --save_audio")
    if not Path(args.jsonl_file).is_file():
        parser.file_error(f"{args.jsonl_file}: no such file")
    return args


def describe(record: dict, processor, coloured: bool) -> str:
    """Formats a row for a terminal: text of the tokens, audio as a count, supervised tokens marked."""
    tokenizer = processor.tokenizer
    labels = record.get("labels") or [-100] * len(record["input_ids"])
    pieces = []
    kinds = [
        "audio" if token == processor.audio_token_id else "supervised" if label != -100 else "prompt"
        for token, label in zip(record["input_ids"], labels, strict=True)
    ]
    for kind, group in groupby(zip(kinds, record["input_ids"], strict=True), key=lambda pair: pair[0]):
        tokens = [token for _, token in group]
        text = f"<{len(tokens)} audio tokens>" if kind == "audio" else tokenizer.decode(tokens)
        if coloured:
            text = {"audio": CYAN, "supervised": GREEN, "prompt": GREY}[kind] + text + RESET
        elif kind == "supervised":
            text = f"[[{text}]]"
        pieces.append(text)
    supervised = sum(label != -100 for label in labels)
    head = f"row {record['index']}: {len(record['input_ids'])} tokens, {record['num_audio_tokens']} of audio"
    head += f" ({record['num_frames']} frames), {supervised} supervised"
    head += f", loss {record['loss']:.4f}" if "loss" in record else ""
    return f"{head}\n{''.join(pieces)}\n"


def inspect(args: argparse.Namespace) -> int:
    """Prints rows and returns the number of bad rows."""
    import torch

    from .. import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
    from ..audio.waveform import AudioError
    from ..data.bad_rows import BadRow
    from ..data.jsonl import read_jsonl
    from ..model import chat

    processor = SpeechLLMProcessor.from_pretrained(args.model_name_or_path)
    model = None
    if args.loss:
        model = SpeechLLMForConditionalGeneration.from_pretrained(args.model_name_or_path, dtype=torch.float32).eval()
    save_audio = _audio_writer(args, processor) if args.save_audio else None
    num_rows = args.num_rows or (None if args.json else 5)
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if not args.json and not args.inference:
        print(f"supervised tokens are {GREEN}green{RESET}\n" if coloured else "supervised tokens are in [[ ]]\n")
    bad = 0
    for index, row in enumerate(islice(read_jsonl(args.jsonl_file, require_answers=not args.inference), num_rows)):
        if isinstance(row, BadRow):
            print(row, file=sys.stderr)
            bad += 1
            continue
        messages, hotwords = row.messages, row.hotwords
        if args.inference:
            if args.language or args.no_itn or args.hotwords:
                prompt = chat.transcription_prompt(args.language, not args.no_itn, chat.parse_hotwords(args.hotwords))
                messages, hotwords = chat.transcription_messages(row.recordings[-1], prompt), []
            elif messages[-1]["role"] == "assistant":
                messages = messages[:-1]
        try:
            batch: Any = processor.apply_chat_template(messages, hotwords=hotwords)
            if save_audio is not None:
                save_audio(index, row.recordings)
        except AudioError as error:
            print(f"{row.file}:{row.line}: {error}", file=sys.stderr)
            bad += 1
            continue
        record = {"index": index, "input_ids": batch["input_ids"][0].tolist()}
        if not args.inference:
            record["labels"] = batch["labels"][0].tolist()
        record["num_audio_tokens"] = record["input_ids"].count(processor.audio_token_id)
        record["num_frames"] = int(batch["input_features_mask"].sum()) if "input_features_mask" in batch else 0
        if model is not None:
            with torch.no_grad():
                record["loss"] = model(**batch).loss.item()
        print(json.dumps(record) if args.json else describe(record, processor, coloured))
    return bad


def _audio_writer(args: argparse.Namespace, processor) -> Callable[[int, list[str]], None]:
    """Returns a function that writes the recordings of a row as in the first epoch of a training with these rows."""
    import soundfile

    from ..data.bad_rows import BadRow
    from ..data.collator import SpeechLLMCollator
    from ..data.jsonl import read_jsonl

    collator = SpeechLLMCollator.augmenting(processor, args.augmentation)
    rows = [row for row in read_jsonl(args.jsonl_file, require_answers=False) if not isinstance(row, BadRow)]
    collator.use_training_rows([{"recordings": row.recordings} for row in rows])
    folder = Path(args.save_audio)
    folder.mkdir(parents=True, exist_ok=True)

    def write(index: int, recordings: list[str]) -> None:
        waveforms = collator.row_waveforms({"recordings": recordings, "seed": (SEED, index)})
        for number, waveform in enumerate(waveforms):
            soundfile.write(folder / f"row{index}_{number}.wav", waveform, processor.sampling_rate)

    return write


def main() -> None:
    """Runs the command; see the docstring of the module."""
    args = parse_arguments()
    show_log(logging.WARNING)
    quiet_transformers()
    try:
        bad = inspect(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `inspect | head`; the main function ends the command
        raise
    except (OSError, ValueError) as error:
        sys.exit(f"{prog()}: error: {error}")
    sys.exit(1 if bad else 0)
