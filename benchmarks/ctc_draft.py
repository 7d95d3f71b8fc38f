"""Drafts of the CTC head: LLM passes, time and texts of greedy search with and without drafts, as JSON.

python benchmarks/ctc_draft.py --scp_file data/test/wav.scp --model_name_or_path exp/model
"""

import argparse
import json
import time

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor, Transcriber
from hf_speechllm.data.bad_rows import BadRows
from hf_speechllm.data.kaldi import read_scp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scp_file", required=True)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch_seconds", type=float, nargs="+", default=[1.0, 60.0], help="1: one by one")
    parser.add_argument("--max_new_tokens", type=int, default=100)
    args = parser.parse_args()
    model = SpeechLLMForConditionalGeneration.from_pretrained(args.model_name_or_path).to(args.device)
    processor = SpeechLLMProcessor.from_pretrained(args.model_name_or_path)
    files = [entry.value for entry in read_scp(args.scp_file, BadRows()).entries]
    passes = 0

    def count(*_) -> None:
        nonlocal passes
        passes += 1

    model.llm.get_decoder().register_forward_hook(count)
    for batch_seconds in args.batch_seconds:
        texts = {}
        row = {"recordings": len(files), "batch_seconds": batch_seconds}
        for name, ctc_draft in (("greedy", False), ("draft", True)):
            transcriber = Transcriber(
                model, processor, batch_seconds, args.max_new_tokens, ctc_draft=ctc_draft, num_workers=1
            )
            passes, started = 0, time.perf_counter()
            texts[name] = transcriber.transcribe(files)
            row |= {f"{name}_passes": passes, f"{name}_seconds": round(time.perf_counter() - started, 2)}
        row["different_texts"] = sum(a != b for a, b in zip(*texts.values(), strict=True))
        print(json.dumps(row))


if __name__ == "__main__":
    main()
