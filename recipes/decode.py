"""Transcribe recordings with a speech LLM: `ID<tab>text` lines, in the order of the input.

python recipes/decode.py --model_name_or_path exp/model --scp_file data/test/wav.scp --output_file exp/hyp.txt
accelerate launch --num_processes 8 recipes/decode.py ...  (a GPU each, sharing the list)

A run that was interrupted, or in which recordings failed, goes on where it was when it is started again.
Exit status: 0 if all were decoded; 1 if some failed (they are listed, the others are in the file) or none could be
tried; 2 for wrong usage.
"""

import argparse
import logging
import os
import sys
from collections import Counter
from pathlib import Path

logger = logging.getLogger("decode")
# What the texts depend on: an unfinished run goes on with the same only.
SETTINGS = ("language", "no_itn", "hotwords", "context", "prompt", "max_new_tokens", "num_beams", "repetition_guard")
SETTINGS += ("vad", "vad_max_seconds")
OPTIONS = ("batch_seconds", "max_new_tokens", "num_beams", "num_workers", "repetition_guard", "cuda_graphs")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="model or LoRA folder, or Hub id")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--scp_file", help="Kaldi list: ID and path or URL")
    source.add_argument("--jsonl_file", help="rows as for training, with their own prompts; IDs are the files' stems")
    parser.add_argument("--output_file", required=True, help="where the texts go")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace --output_file, or an unfinished run's results"
    )
    parser.add_argument("--language", help="language to write: 中文, 英文, 日文, ... or zh, en, ja, ...")
    parser.add_argument("--no_itn", action="store_true", help="write numbers as they are spoken")
    parser.add_argument(
        "--hotwords", help="words that may occur, with commas between, or a file with one in each line"
    )
    parser.add_argument("--context", help="what the recordings are about, in a sentence or two")
    parser.add_argument("--prompt", help="an instruction of one's own, instead of --language and --no_itn")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="the longest text (of a segment), in tokens")
    parser.add_argument("--batch_seconds", type=float, default=240.0, help="padded audio seconds in a batch")
    parser.add_argument("--num_beams", type=int, default=1, help="1: greedy search")
    parser.add_argument(
        "--repetition_guard", action="store_true", help="stop, cut and report texts that end in a loop"
    )
    parser.add_argument("--vad", action="store_true", help="find speech, decode segments, write their times")
    parser.add_argument("--vad_max_seconds", type=float, default=30.0, help="the longest segment")
    parser.add_argument("--num_workers", type=int, default=min(8, os.cpu_count() or 1), help="threads that load audio")
    parser.add_argument("--no_cuda_graphs", dest="cuda_graphs", action="store_false", help="slower, on a GPU")
    parser.add_argument("--device", help="default: this process's GPU, else the CPU")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 on a GPU, else float32")
    args = parser.parse_args()
    for name in ("max_new_tokens", "batch_seconds", "num_beams", "vad_max_seconds", "num_workers"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} must be above 0")
    if not Path(args.scp_file or args.jsonl_file).is_file():
        parser.error(f"{args.scp_file or args.jsonl_file}: no such file")
    if not Path(args.output_file).absolute().parent.is_dir():
        parser.error(f"{args.output_file}: no such folder; make it first")
    unfinished = Path(f"{args.output_file}.partial-0.jsonl").exists()
    if Path(args.output_file).exists() and not args.overwrite and not unfinished:
        parser.error(f"{args.output_file} exists; remove it, or replace it with --overwrite")
    return args


def read_requests(args, bad_rows) -> list:
    """The requests of the list; what can't be read goes to `bad_rows`."""
    from hf_speechllm.inference.hotword_option import read_hotwords
    from hf_speechllm.inference.requests import requests_of_jsonl, requests_of_scp
    from hf_speechllm.model import chat

    hotwords = read_hotwords(args.hotwords)
    prompt = chat.transcription_prompt(args.language, not args.no_itn, hotwords, args.prompt, args.context)
    if args.scp_file:
        requests = requests_of_scp(args.scp_file, prompt, bad_rows)
    else:
        is_own = args.language or args.no_itn or args.prompt or args.context or hotwords
        requests = requests_of_jsonl(args.jsonl_file, prompt if is_own else None, bad_rows)
    if not requests and not bad_rows:
        raise ValueError(f"{args.scp_file or args.jsonl_file}: no recordings")
    return requests


def main() -> None:
    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    import torch

    from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
    from hf_speechllm.audio.vad import VoiceDetector
    from hf_speechllm.data.bad_rows import BadRows
    from hf_speechllm.inference.decoding import decode_requests
    from hf_speechllm.inference.distributed import Processes
    from hf_speechllm.inference.journal import Journal, model_stamp
    from hf_speechllm.inference.transcriber import Transcriber
    from hf_speechllm.inference.writers import write_results

    bad_rows = BadRows(max_bad_fraction=1.0)
    with Processes() as processes:
        on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
        device = args.device or (f"cuda:{processes.local_rank}" if on_gpu else "cpu")
        dtype = args.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
        settings = {name: getattr(args, name) for name in SETTINGS if args.vad or name != "vad_max_seconds"}
        settings |= {"dtype": dtype, "model": model_stamp(args.model_name_or_path)}
        journal = Journal(args.output_file, settings, processes.rank)
        if args.overwrite and processes.rank == 0:
            journal.remove()
        processes.gather(None)  # nobody reads before it is removed
        try:
            requests = read_requests(args, bad_rows)
            journal.read()
            twice = [id_ for id_, count in Counter(request.id for request in requests).items() if count > 1]
            if args.vad and twice:
                raise ValueError(f"two recordings are called {twice[0]}; --vad writes files named by ID: rename one")
            if twice and processes.rank == 0:
                logger.warning(
                    "%d IDs are there more than once, as %s; score.py won't take that", len(twice), twice[0]
                )
            vad = VoiceDetector(args.vad_max_seconds) if args.vad else None
            model = SpeechLLMForConditionalGeneration.from_pretrained(
                args.model_name_or_path, dtype=getattr(torch, dtype)
            )
            processor = SpeechLLMProcessor.from_pretrained(args.model_name_or_path)
            options = {name: getattr(args, name) for name in OPTIONS}
            transcriber = Transcriber(model.to(device), processor, vad=vad, **options)
        except (OSError, ValueError) as error:
            sys.exit(f"decode.py: error: {error}" if processes.rank == 0 else 1)
        outcome = decode_requests(transcriber, requests, journal, processes)
        if processes.rank > 0:
            return

    write_results(args.output_file, outcome.results, args.vad or args.repetition_guard, subtitles=args.vad)
    failures = [*map(str, bad_rows), *outcome.failures]
    loops = sum(transcript.looped for _, transcript in outcome.results)
    logger.info(
        "%s: %d texts; %.1f s of audio in %.1f s (RTFx %.0f); %d failed%s",
        args.output_file, len(outcome.results), outcome.seconds, outcome.elapsed, outcome.seconds / outcome.elapsed,
        len(failures), f"; {loops} loops cut" if args.repetition_guard else "",
    )  # fmt: skip
    if failures:
        hint = f"Mend them and start again; the others are kept in {args.output_file}.partial-*.jsonl"
        sys.exit("\n".join([f"decode.py: {len(failures)} failed:", *failures, hint]))
    journal.remove()


if __name__ == "__main__":
    main()
