"""Drafts of the CTC head: passes of the LLM, time, texts and error rate with and without drafts, as JSON lines.

python benchmarks/ctc_draft.py --jsonl_file data/test.jsonl --model_name_or_path exp/model --thresholds 0.9 0.99
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor, Transcriber, load_audio
from hf_speechllm.data.bad_rows import BadRow
from hf_speechllm.data.jsonl import read_jsonl
from hf_speechllm.evaluation.scoring import ErrorCounts, count_errors


def read_recordings(jsonl_file: str, rate: int) -> tuple[list, list[str]]:
    """Returns waveforms and transcripts of the rows; every row has one recording."""
    rows = [row for row in read_jsonl(jsonl_file) if not isinstance(row, BadRow)]
    waveforms = [load_audio(row.recordings[-1], rate) for row in rows]
    return waveforms, [row.dialogue.turns[-1].answer for row in rows]


class Passes:
    """Counts the forward passes of the LLM."""

    def __init__(self, model: SpeechLLMForConditionalGeneration):
        self.count = 0
        self.model = model

    def __enter__(self):
        self._handle = self.model.llm.get_decoder().register_forward_hook(self._add)
        return self

    def __exit__(self, *exception):
        self._handle.remove()

    def _add(self, *arguments) -> None:
        self.count += 1


def compare(
    model: SpeechLLMForConditionalGeneration,
    processor: SpeechLLMProcessor,
    waveforms: Sequence,
    references: Sequence[str],
    batch_seconds: float,
    thresholds: Sequence[float] = (),
    max_new_tokens: int = 100,
) -> Iterator[dict]:
    """Yields a line for greedy search, for verified drafts, and for each threshold.

    Args:
        model: with a CTC head over the LLM's tokens, on the device.
        processor: of the model.
        waveforms: recordings, each of shape = (samples,).
        references: transcripts of the recordings.
        batch_seconds: padded audio seconds per batch; 1 decodes one by one.
        thresholds: `ctc_draft_threshold`s to measure.
        max_new_tokens: maximum number of tokens of a text.
    """
    greedy = None
    modes = [(False, None), (True, None), *((True, threshold) for threshold in thresholds)]
    for ctc_draft, threshold in modes:
        transcriber = Transcriber(
            model, processor, batch_seconds, max_new_tokens, num_workers=1, ctc_draft=ctc_draft,
            ctc_draft_threshold=threshold,
        )  # fmt: skip
        transcriber.transcribe(waveforms[:2])  # warm-up
        with Passes(model) as passes:
            started = time.perf_counter()
            texts = transcriber.transcribe(waveforms)
            seconds = time.perf_counter() - started
        greedy = greedy or texts
        errors = sum((count_errors(*pair) for pair in zip(references, texts, strict=True)), start=ErrorCounts())
        yield {
            "draft": ctc_draft, "threshold": threshold, "recordings": len(waveforms), "batch_seconds": batch_seconds,
            "llm_passes": passes.count, "seconds": round(seconds, 3), "error_rate": round(errors.rate, 5),
            "different_texts": sum(a != b for a, b in zip(greedy, texts, strict=True)),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jsonl_file", required=True, help="rows with one recording")
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch_seconds", type=float, nargs="+", default=[1.0, 60.0], help="1: one by one")
    parser.add_argument("--thresholds", type=float, nargs="*", default=[], help="values of --ctc_draft_threshold")
    parser.add_argument("--max_new_tokens", type=int, default=100)
    args = parser.parse_args()
    model = SpeechLLMForConditionalGeneration.from_pretrained(args.model_name_or_path).to(args.device)
    processor = SpeechLLMProcessor.from_pretrained(args.model_name_or_path)
    recordings = read_recordings(args.jsonl_file, processor.sampling_rate)
    for batch_seconds in args.batch_seconds:
        for line in compare(model, processor, *recordings, batch_seconds, args.thresholds, args.max_new_tokens):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
