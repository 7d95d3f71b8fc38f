"""Make a training JSONL of two Kaldi lists: recordings (`ID PATH_OR_URL`) and transcripts (`ID TEXT`).

The lists are joined by ID; the rows keep the order of the recordings. Every recording is checked to its end. Nothing
is left out without leave: a bad line or recording is named with file and line, and stops the run before anything is
written, unless --max_bad_fraction allows it.

    python recipes/scp2jsonl.py --scp_file data/wav.scp --transcript_file data/text --jsonl_file data/train.jsonl \\
        --model_name_or_path FunAudioLLM/Fun-ASR-Nano-2512-hf
"""

import argparse
import gc
import logging
import os
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise ValueError
    return float(text)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line, and finds before any work what is wrong with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scp_file", required=True, help="recordings; relative paths are relative to its folder")
    parser.add_argument("--transcript_file", required=True, help="transcripts, in any order")
    parser.add_argument("--jsonl_file", required=True, help="file to write")
    parser.add_argument("--model_name_or_path", help="its tokenizer counts text_length; else that is left out")
    parser.add_argument("--language", help="ISO code or Chinese name of the language that the prompt asks for")
    parser.add_argument("--no_itn", action="store_true", help="prompt without inverse text normalisation")
    parser.add_argument("--prompt", help='instead of the default one, as in "Speech transcription:"')
    parser.add_argument("--relative", action="store_true", help="write paths relative to the JSONL, not absolute ones")
    parser.add_argument("--audio_root", help="folder that recordings must lie in, links followed (default: anywhere)")
    parser.add_argument("--max_bad_fraction", type=fraction, default=0.0, help="share of rows that may be left out")
    parser.add_argument("--bad_rows_file", help="file for the list of all bad rows")
    parser.add_argument("--num_workers", type=int, default=max(8, os.cpu_count() or 1), help="threads that check")
    parser.add_argument("--overwrite", action="store_true", help="replace --jsonl_file if it exists")
    args = parser.parse_args()
    for flag in ("scp_file", "transcript_file"):
        if not os.path.isfile(getattr(args, flag)):
            parser.error(f"--{flag} {getattr(args, flag)}: no such file")
    if os.path.exists(args.jsonl_file) and not args.overwrite:
        parser.error(f"--jsonl_file {args.jsonl_file}: exists; give another name or --overwrite")
    folder = os.path.dirname(os.path.abspath(args.jsonl_file))
    if not os.access(folder, os.W_OK):
        parser.error(f"--jsonl_file {args.jsonl_file}: its folder is missing or not writable")
    if args.num_workers < 1:
        parser.error("--num_workers must be 1 or more")
    return args


def load_tokenizer(name: str):
    """The tokenizer of a model: a folder or Hub id; in FunASR's layout it is in a folder of its own (Qwen3-0.6B)."""
    from transformers import AutoTokenizer

    if Path(name, "config.yaml").is_file():
        inner = sorted(Path(name).glob("*/tokenizer_config.json"))
        name = str(inner[0].parent) if inner else name
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model_name_or_path {name}: no tokenizer: {error}") from error


def make_rows(utterances, prompt: str, tokenizer, args: argparse.Namespace, bad_rows) -> tuple[list[dict], list]:
    """A row for each good utterance, and the durations in seconds."""
    from tqdm import tqdm

    from hf_speechllm.audio import AudioError, is_url
    from hf_speechllm.chat import ChatError, parse_messages, transcription_messages
    from hf_speechllm.data.kaldi import add_text_lengths, measure_recording

    def measure(utterance):
        try:
            return measure_recording(utterance.recording)
        except AudioError as error:
            return error

    folder = os.path.realpath(os.path.dirname(os.path.abspath(args.jsonl_file)))
    rows, durations = [], []
    # Not one by one: to hand over a recording takes longer than to read a header. Not too many: some are hours long.
    chunk = max(1, min(128, len(utterances) // (16 * args.num_workers)))
    with ThreadPool(args.num_workers) as pool:  # threads: libsndfile and FFmpeg work outside Python's lock
        measured = tqdm(pool.imap(measure, utterances, chunk), "checking", len(utterances), unit=" recordings")
        for utterance, result in zip(utterances, measured, strict=True):
            source = utterance.recording
            if args.relative and not is_url(source):
                source = os.path.relpath(source, folder)
            messages = transcription_messages(source, prompt, utterance.transcript)
            try:
                parse_messages(messages)
            except ChatError as error:
                bad_rows.add(args.transcript_file, utterance.transcript_line, f"unusable transcript: {error}")
                continue
            if isinstance(result, AudioError):
                bad_rows.add(args.scp_file, utterance.recording_line, f"unusable recording: {result}")
                continue
            rows.append({"messages": messages, "speech_length": result[1]})
            durations.append(result[0])
    if tokenizer is not None:
        add_text_lengths(rows, tokenizer)
    return rows, durations


def main(args: argparse.Namespace) -> None:
    from hf_speechllm import chat
    from hf_speechllm.data.bad_rows import BadDataError, BadRows
    from hf_speechllm.data.jsonl import write_jsonl
    from hf_speechllm.data.kaldi import join, read_list, read_scp

    prompt = chat.transcription_prompt(args.language, not args.no_itn, prompt=args.prompt)
    chat.parse_messages(chat.transcription_messages("recording", prompt))
    tokenizer = load_tokenizer(args.model_name_or_path) if args.model_name_or_path else None
    if tokenizer is None:
        logging.info("no --model_name_or_path: text_length is left out of the rows")
    gc.freeze()  # what is loaded by now stays; to search it for garbage as the rows grow takes a quarter of the time
    bad_rows = BadRows(args.max_bad_fraction, args.bad_rows_file)
    transcripts = read_list(args.transcript_file, bad_rows, "transcript")
    utterances = join(read_scp(args.scp_file, bad_rows, args.audio_root), transcripts, bad_rows)
    rows, durations = make_rows(utterances, prompt, tokenizer, args, bad_rows)
    bad_rows.check(total=len(rows) + len(bad_rows))
    if not rows:
        raise BadDataError(f"{args.scp_file}: no rows to write")
    write_jsonl(rows, args.jsonl_file)

    seconds = sum(durations)
    print(f"rows: {len(rows)}\nhours: {seconds / 3600:.3f}")
    print(f"seconds: mean {seconds / len(rows):.2f}, min {min(durations):.2f}, max {max(durations):.2f}")
    if tokenizer is not None:
        print(f"tokens: {sum(row['text_length'] for row in rows)}")
    kinds = ", ".join(f"{kind} {count}" for kind, count in bad_rows.kinds().most_common())
    print(f"bad rows: {len(bad_rows)}" + (f" ({kinds})" if kinds else ""))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    arguments = parse_arguments()
    try:
        main(arguments)
    except (OSError, ValueError) as error:  # bad data, unknown language or model, full disk
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"interrupted; {arguments.jsonl_file} is as it was", file=sys.stderr)
        sys.exit(130)
