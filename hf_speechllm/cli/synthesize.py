"""Make synthetic training speech: texts, spoken by installed engines with many voices, rates and pitches.

# Your own texts, one sentence per line
hf-speechllm synthesize --texts sentences.txt --output_dir data/synthetic --engines espeak=0.85 flite=0.15

# Texts sampled from an LLM, 60,000 rows
hf-speechllm synthesize --llm Qwen/Qwen3-0.6B --num_texts 60000 --output_dir data/synthetic

# Half of the rows: random words of a list, which teach words that the texts lack
hf-speechllm synthesize --texts sentences.txt --word_list words.txt --random_words 0.5 --output_dir data/synthetic

Writes tar shards for `finetune --train_file 'data/synthetic/*.tar'`. The command continues after an interruption.
Engines are commands: espeak (eSpeak NG: apt install espeak-ng), mbrola (eSpeak NG with recorded diphones: apt install
mbrola mbrola-us1 ...), pico (apt install libttspico-utils), flite (English), rhvoice (apt install rhvoice
rhvoice-english), piper (pip install piper-tts, with voices in --piper_voices), or your own with --command.

Synthetic speech teaches a new adaptor which sounds belong to which tokens. It does not replace real recordings: the
voices of rule-based engines sound like no speaker. Train on real speech afterwards, and validate on real speech only.
"""

from __future__ import annotations

import argparse
import glob
import logging
import random
import sys
from pathlib import Path

from ..console import command, print_summary, progress_bar, quiet_transformers, show_log
from ..options import usable_cores
from .arguments import add_waveform_augmentation, waveform_augmentation_of
from .parser import Parser, prog

logger = logging.getLogger(__name__)


def main() -> None:
    """Runs the command; see the docstring of the module."""
    parser = Parser(__doc__)
    parser.add_argument("--output_dir", required=True, help="folder for the shards")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--texts", help="file with one text per line")
    source.add_argument("--llm", help="LLM from which texts are sampled: folder, Hub id or GGUF file")
    parser.add_argument("--num_texts", type=int, default=10_000, help="number of texts to sample from the LLM")
    parser.add_argument(
        "--text_prompt",
        nargs="+",
        default=[""],
        help="beginnings of sampled texts, used in turn (default: none); {word}: a word of --word_list",
    )
    parser.add_argument(
        "--shuffled_words", type=float, default=0.0, help="share of the rows with the words of a text in random order"
    )
    parser.add_argument(
        "--word_list", help="file with one word per line, for --random_words, --replaced_words and {word}"
    )
    parser.add_argument(
        "--random_words", type=float, default=0.0, help="share of the rows that speak random words of --word_list"
    )
    parser.add_argument(
        "--replaced_words",
        type=float,
        default=0.0,
        help="share of the words of the other rows that random words of --word_list replace",
    )
    parser.add_argument("--num_rows", type=int, help="number of rows (default: one per text; more: texts repeat)")
    parser.add_argument("--language", default="en", help="language of the voices, for example cmn")
    parser.add_argument(
        "--engines",
        nargs="+",
        default=["espeak"],
        metavar="NAME[=SHARE]",
        help="engines and their shares of the rows (default: espeak)",
    )
    parser.add_argument("--piper_voices", help="folder with voices of Piper: NAME.onnx and NAME.onnx.json")
    parser.add_argument(
        "--command",
        nargs="+",
        default=[],
        metavar="NAME=COMMAND",
        help="further engines: command lines with {text} (file) and {wav}, and if possible {voice}, {rate}, {pitch}",
    )
    parser.add_argument(
        "--voices", nargs="+", default=["default"], help="voices of the engines of --command (default: one)"
    )
    parser.add_argument("--prompt", help="user's text of every row (default: Fun-ASR's transcription prompt)")
    parser.add_argument("--seed", type=int, default=0, help="seed of texts, engines, voices, rates and pitches")
    parser.add_argument("--num_workers", type=int, default=usable_cores(), help="number of processes")
    parser.add_argument("--rows_per_shard", type=int, default=1000, help="rows in a shard")
    parser.add_argument("--max_bad_fraction", type=float, default=0.01, help="largest share of rows that fail")
    add_waveform_augmentation(parser, "Augmentation of the recordings")
    args = parser.parse_args()
    args.augmentation = waveform_augmentation_of(args, parser)
    for name in ("shuffled_words", "random_words", "replaced_words"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name} is {getattr(args, name):g}; it must be between 0 and 1")
    if args.shuffled_words + args.random_words > 1:
        parser.error("--shuffled_words and --random_words are more than 1 together; reduce one")
    asks = any("{word}" in text for text in args.text_prompt)
    if args.word_list is None and (args.random_words or args.replaced_words or asks):
        parser.error("--random_words, --replaced_words and {word} need --word_list")
    if args.texts is not None and args.text_prompt != [""]:
        parser.error("--text_prompt is for texts sampled from --llm; leave it out with --texts")
    for name in ("num_texts", "num_rows", "num_workers", "rows_per_shard"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if not args.language.strip():
        parser.error("--language is empty; name a language, for example en or cmn")
    if args.seed < 0:
        parser.error(f"--seed is {args.seed}; it must be at least 0")
    show_log()
    try:
        synthesize_rows(args)
    except (OSError, ValueError) as error:
        sys.exit(f"{prog()}: error: {error}")


def shares_of(engines: list[str], commands: list[str]) -> tuple[dict[str, float], dict[str, str]]:
    """Returns the share of each engine, with a sum of 1, and the command lines of further engines.

    Raises:
        ValueError: if an engine is unknown or a share is invalid.
    """
    from ..data.speech_engines import ENGINES, fill_command

    own = dict(item.split("=", 1) for item in commands if "=" in item)
    if len(own) < len(commands) or any("{wav}" not in command for command in own.values()):
        raise ValueError("--command must be NAME=COMMAND, and the command must contain {wav}")
    for name, line in own.items():
        try:
            fill_command(line, "", 1.0, 1.0, "", "")
        except (AttributeError, LookupError, ValueError) as error:
            fields = "{voice}, {rate}, {pitch}, {text}, {wav}"
            raise ValueError(f"--command {name}: {error}; the fields are {fields}") from error
    given = {name: share for name, _, share in (item.partition("=") for item in engines)}
    if len(given) < len(engines):
        raise ValueError("--engines names an engine twice; name each once")
    for name in given.keys() - {*ENGINES, *own}:
        raise ValueError(f"--engines {name}: unknown engine; choose from {', '.join([*ENGINES, *own])}")
    try:
        shares = {name: float(share or 1) for name, share in given.items()}
    except ValueError:
        shares = {}
    if not shares or not all(0 < share < float("inf") for share in shares.values()):
        raise ValueError("--engines must be NAME or NAME=SHARE, with shares above 0")
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}, {name: own[name] for name in own.keys() & shares}


def lines_of(file: str) -> list[str]:
    """Returns the lines of a file that are not empty, with single spaces.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not UTF-8, or has no text.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: {error}; save the file as UTF-8") from error
    found = [" ".join(line.split()) for line in lines if line.strip()]
    if not found:
        raise ValueError(f"{file}: no texts")
    return found


def synthesize_rows(args: argparse.Namespace) -> None:
    """Reads or samples the texts, and writes the shards."""
    from ..data.speech_engines import voices_of
    from ..data.synthesis import Plan, check_settings, clean_texts, digest, synthesize
    from ..files import atomic_write
    from ..model.chat import transcription_prompt

    shares, commands = shares_of(args.engines, args.command)
    voices = voices_of([name for name in shares if name not in commands], args.language, args.piper_voices)
    voices.update(dict.fromkeys(commands, args.voices))
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    words = lines_of(args.word_list) if args.word_list is not None else []
    if args.texts is not None:
        texts = lines_of(args.texts)
    else:
        file = folder / "texts.txt"
        asked = any("{word}" in prompt for prompt in args.text_prompt)
        sampling = {name: vars(args)[name] for name in ("llm", "num_texts", "text_prompt", "seed")}
        sampling["words"] = digest(words) if asked else None
        check_settings(folder / "texts.json", sampling)
        if not file.is_file():
            from ..inference.text_sampling import sample_sentences

            prompts = args.text_prompt
            if asked:
                order = random.Random(args.seed).sample(words, len(words))
                prompts = [prompt.replace("{word}", word) for word in order for prompt in prompts]
            quiet_transformers()
            with progress_bar(desc="sampling", total=args.num_texts, unit=" texts") as progress:

                def show(count: int) -> None:
                    progress.update(min(count, args.num_texts) - progress.n)

                sampled = sample_sentences(args.llm, args.num_texts, clean_texts, prompts, args.seed, show)
            with atomic_write(file) as opened:
                opened.writelines(f"{text}\n" for text in sampled)
        texts = file.read_text(encoding="utf-8").splitlines()
    prompt = transcription_prompt(prompt=args.prompt)
    plan = Plan(
        texts=texts,
        num_rows=args.num_rows or len(texts),
        voices=voices,
        shares=shares,
        prompt=prompt,
        seed=args.seed,
        rows_per_shard=args.rows_per_shard,
        shuffled=args.shuffled_words,
        words=words,
        random_words=args.random_words,
        replaced_words=args.replaced_words,
        augmentation=args.augmentation,
        commands=commands,
    )
    found = ", ".join(f"{len(names)} of {engine}" for engine, names in voices.items())
    logger.info("%d rows; voices: %s", plan.num_rows, found)
    made = synthesize(plan, folder, args.num_workers, args.max_bad_fraction)
    bar = progress_bar(made, desc="speaking", total=plan.num_shards, unit=" shards")
    hours = sum(seconds for _, seconds in bar) / 3600
    shards = f"{glob.escape(str(folder))}/*.tar"
    next_command = command(
        "finetune", "adaptor_only", model_name_or_path="MODEL", train_file=shards, output_dir="exp/adaptor"
    )
    facts = {"rows": f"{plan.num_rows}, {hours:.2f} h of new speech", "written": f"{folder}: {plan.num_shards} shards"}
    print_summary(facts, [next_command])
