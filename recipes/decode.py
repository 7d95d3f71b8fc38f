"""Transcribe recordings with a speech LLM: `ID<tab>text` lines, in the order of the input.

python recipes/decode.py --model_name_or_path exp/model --scp_file data/test/wav.scp --output_file exp/hyp.txt

Exit status: 0 if all were decoded, 1 if some failed (they are listed, the others are in the file), 2 for wrong usage.
"""

import argparse
import logging
import os
import sys
import time
from pathlib import Path

logger = logging.getLogger("decode")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="model or LoRA folder, or Hub id")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--scp_file", help="Kaldi list: ID and path or URL")
    source.add_argument("--jsonl_file", help="rows as for training, with their own prompts; IDs are the files' stems")
    parser.add_argument("--output_file", required=True, help="where the texts go")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output_file")
    parser.add_argument("--language", help="language to write: 中文, 英文, 日文, ... or zh, en, ja, ...")
    parser.add_argument("--no_itn", action="store_true", help="write numbers as they are spoken")
    parser.add_argument("--hotwords", help="words that may occur, separated by commas")
    parser.add_argument("--prompt", help="an instruction of one's own, instead of --language and --no_itn")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="the longest text, in tokens")
    parser.add_argument("--batch_seconds", type=float, default=240.0, help="padded audio seconds in a batch")
    parser.add_argument("--num_beams", type=int, default=1, help="1: greedy search")
    parser.add_argument("--num_workers", type=int, default=min(8, os.cpu_count() or 1), help="threads that load audio")
    parser.add_argument("--device", help="default: the first GPU, else the CPU")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 on a GPU, else float32")
    args = parser.parse_args()
    if Path(args.output_file).exists() and not args.overwrite:
        parser.error(f"{args.output_file} exists; remove it, or replace it with --overwrite")
    return args


def read_requests(args, bad_rows) -> list:
    """The requests of the list; what can't be read goes to `bad_rows`."""
    from hf_speechllm import chat
    from hf_speechllm.data.bad_rows import BadRow
    from hf_speechllm.data.jsonl import read_jsonl
    from hf_speechllm.data.kaldi import read_scp
    from hf_speechllm.inference.transcriber import Request

    hotwords = chat.parse_hotwords(args.hotwords)
    prompt = chat.transcription_prompt(args.language, not args.no_itn, hotwords, args.prompt)
    if args.scp_file:
        entries = read_scp(args.scp_file, bad_rows).entries
        return [Request(entry.id, chat.transcription_messages(entry.value, prompt)) for entry in entries]
    own_prompt = args.language or args.no_itn or args.prompt or hotwords
    requests = []
    for row in read_jsonl(args.jsonl_file, require_answers=False):
        if isinstance(row, BadRow):
            bad_rows.add(row.file, row.line, row.reason)
            continue
        messages = row.messages[:-1] if row.messages[-1]["role"] == "assistant" else row.messages
        if own_prompt:
            messages = chat.transcription_messages(row.recordings[-1], prompt)
        requests.append(Request(Path(row.recordings[-1]).stem, messages, () if own_prompt else tuple(row.hotwords)))
    return requests


def main() -> None:
    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    import torch
    from tqdm import tqdm

    from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
    from hf_speechllm.data.bad_rows import BadRows
    from hf_speechllm.files import atomic_write
    from hf_speechllm.inference.transcriber import Transcriber

    bad_rows = BadRows(max_bad_fraction=1.0)
    try:
        requests = read_requests(args, bad_rows)
    except (OSError, ValueError) as error:
        sys.exit(f"decode.py: error: {error}")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
    model = SpeechLLMForConditionalGeneration.from_pretrained(args.model_name_or_path, dtype=dtype).to(device)
    processor = SpeechLLMProcessor.from_pretrained(args.model_name_or_path)
    transcriber = Transcriber(
        model, processor, args.batch_seconds, args.max_new_tokens, args.num_beams, args.num_workers
    )

    started, seconds, failures = time.perf_counter(), 0.0, [str(row) for row in bad_rows]
    texts: dict[int, str] = {}
    with tqdm(total=len(requests), desc="decoding", unit="recording") as progress:
        for transcript in transcriber(requests):
            if transcript.error is None:
                texts[transcript.index] = transcript.text
            else:
                failures.append(f"{requests[transcript.index].id}: {transcript.error}")
            seconds += transcript.seconds
            progress.set_postfix(RTFx=f"{seconds / (time.perf_counter() - started):.0f}", refresh=False)
            progress.update()
    with atomic_write(args.output_file) as file:
        file.writelines(f"{requests[index].id}\t{' '.join(texts[index].split())}\n" for index in sorted(texts))
    elapsed = time.perf_counter() - started
    logger.info("%s: %d texts, %.0f s of audio in %.0f s", args.output_file, len(texts), seconds, elapsed)
    if failures:
        sys.exit("\n".join([f"decode.py: {len(failures)} failed:", *failures]))


if __name__ == "__main__":
    main()
