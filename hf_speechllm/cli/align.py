"""Find the times of the words of given transcripts, with the CTC head of a model.

hf-speechllm align data/text --scp_file data/wav.scp --model_name_or_path exp/head --output_file exp/aligned.txt
hf-speechllm align data/train.jsonl --model_name_or_path exp/head --output_file exp/aligned.txt

REF contains lines `ID TEXT`, or is a training JSONL. Writes exp/aligned.words.jsonl, exp/aligned.ctm,
exp/aligned.textgrids/ID.TextGrid, exp/aligned.subtitles/ID.srt and .vtt, and the texts.
Exit status: 0 if all recordings were aligned; 1 if recordings failed (listed; the output has the others).
"""

import logging
import sys
from pathlib import Path

from ..console import print_summary, progress_bar, quiet_transformers, show_log
from .parser import Parser, prog, refuse_input

logger = logging.getLogger(__name__)


def main() -> None:
    """Runs the command; see the docstring of the module."""
    parser = Parser(__doc__)
    parser.add_argument("reference", metavar="REF", help="transcripts: lines `ID TEXT`, or JSONL")
    parser.add_argument("--model_name_or_path", required=True, help="model folder or Hub id; requires a CTC head")
    parser.add_argument("--scp_file", help="recordings: Kaldi list (default: the recordings in a JSONL)")
    parser.add_argument("--output_file", required=True, help="file for the texts; other files are written beside it")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.add_argument("--batch_seconds", type=float, default=240.0, help="audio seconds per batch")
    parser.add_argument("--device", help="device (default: GPU, otherwise the CPU)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="dtype (default: bfloat16 on a GPU)")
    args = parser.parse_args()
    refuse_input(parser, "--output_file", args.output_file, (args.reference, args.scp_file))
    if Path(args.output_file).exists() and not args.overwrite:
        parser.file_error(f"{args.output_file} exists; remove the file, or replace it with --overwrite")
    show_log()
    quiet_transformers()

    from ..data.bad_rows import BadRows
    from ..data.kaldi import read_scp
    from ..data.transcripts import read_transcripts, require_common_ids
    from ..inference.aligning import Aligner
    from ..inference.writers import write_failures, write_results
    from .decoding import load_model

    bad_rows = BadRows(max_bad_fraction=1.0)
    try:
        transcripts = read_transcripts(args.reference, required=True)
        recordings = transcripts.recordings
        if args.scp_file:
            recordings = {entry.id: entry.value for entry in read_scp(args.scp_file, bad_rows).entries}
        elif not recordings:
            raise ValueError(f"{args.reference} names no recordings; add --scp_file")
        require_common_ids(args.reference, transcripts.texts, {args.scp_file: recordings})
        model, processor = load_model(args.model_name_or_path, args.device, args.dtype)
        aligner = Aligner(model, processor, args.batch_seconds)
    except (OSError, ValueError) as error:
        sys.exit(f"{prog()}: error: {error}")
    ids = [id_ for id_ in transcripts.texts if id_ in recordings]
    results, failures = [], []
    items = ((recordings[id_], transcripts.texts[id_]) for id_ in ids)
    bar = progress_bar(aligner(items), desc="aligning", total=len(ids), unit=" recordings")
    for id_, transcript in zip(ids, bar, strict=True):
        if transcript.error is None:
            results.append((id_, transcript))
        else:
            failures.append(f"{id_}: {transcript.error}")
    failures += [f"{id_}: no recording in {args.scp_file}" for id_ in transcripts.texts if id_ not in recordings]
    try:
        written = write_results(args.output_file, results, subtitles=True, words=True)
        named = write_failures(args.output_file, failures)
    except OSError as error:
        sys.exit(f"{prog()}: error: {error}")
    words = [word for _, transcript in results for word in transcript.words]
    print_summary({"aligned": f"{len(results)} recordings, {len(words)} words", "written": written})
    if failures:
        sys.exit(f"{prog()}: {len(failures)} failed:\n{named}")
