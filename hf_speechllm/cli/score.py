"""Score transcripts: error rates with confidence intervals, a comparison, hotwords, and a page with worst utterances.

    hf-speechllm score data/test/text exp/hyp.txt --output_dir exp/score --scp_file data/test/wav.scp

REF and HYP contain lines `ID TEXT`, not normalised; REF may be a training JSONL. References without a hypothesis count
as deletions and are listed. The language of the reference, or of --utt2lang, decides the rules of normalisation.
"""

import argparse
import json
import logging
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from ..console import print_summary, show_log
from ..options import usable_cores
from .parser import Parser, prog

OUTPUTS = ("cer.txt", "score.json", "report.html")
UNSEEN_WORDS = "unseen_words.txt"  # with --train_file

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("reference", metavar="REF", help="lines `ID TEXT`, or rows of a .jsonl")
    parser.add_argument("hypothesis", metavar="HYP", help="lines `ID TEXT`, the output of hf-speechllm decode")
    parser.add_argument("--output_dir", required=True, help=f"folder for {', '.join(OUTPUTS)}")
    parser.add_argument("--compare", metavar="HYP2", help="other hypotheses, for example of the model before training")
    parser.add_argument("--scp_file", help="recordings, for durations and audio players on the page")
    parser.add_argument("--utt2dur", help="lines `ID SECONDS`; otherwise durations come from the recordings")
    parser.add_argument("--utt2dataset", help="lines `ID NAME`, for scores by data set")
    parser.add_argument("--utt2lang", help="lines `ID LANGUAGE` (en, zh, ...), for the rules of normalisation")
    parser.add_argument("--hotwords", help="comma-separated hotwords, or a file with one hotword per line")
    parser.add_argument(
        "--words", help="HYP.words.jsonl of decode --word_times: calibrates the confidence of words (confidence.json)"
    )
    parser.add_argument(
        "--train_file",
        nargs="+",
        metavar="FILE",
        help="training data, as in finetune: errors by the number of times that a word occurs in the training "
        f"transcripts, and wrong words that never occur ({UNSEEN_WORDS})",
    )
    parser.add_argument("--no_normalize", action="store_true", help="count the tokens of compute-wer")
    parser.add_argument("--num_worst", type=int, default=30, help="number of worst utterances on the page")
    parser.add_argument("--no_audio", action="store_true", help="do not embed recordings in the page")
    parser.add_argument("--num_resamples", type=int, default=10_000, help="number of bootstrap samples")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    parser.add_argument(
        "--num_workers", type=int, default=usable_cores(), help="number of processes for normalisation"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files in --output_dir")
    args = parser.parse_args()
    if args.hypothesis.endswith(".jsonl"):
        parser.error(f"{args.hypothesis} contains training rows, which must be REF; pass REF before HYP")
    for name, minimum in (("num_worst", 0), ("num_resamples", 100), ("num_workers", 1)):
        if getattr(args, name) < minimum:
            parser.error(f"--{name} must be at least {minimum}")
    for name in ("reference", "hypothesis", "compare", "scp_file", "utt2dur", "utt2dataset", "utt2lang", "words"):
        if getattr(args, name) and not Path(getattr(args, name)).is_file():
            parser.file_error(f"{getattr(args, name)}: no such file")
    args.outputs = [*OUTPUTS, UNSEEN_WORDS] if args.train_file else [*OUTPUTS]
    existing = [name for name in (*OUTPUTS, UNSEEN_WORDS) if Path(args.output_dir, name).exists()]
    if existing and not args.overwrite:
        parser.file_error(
            f"--output_dir {args.output_dir} contains {', '.join(existing)}; remove the files, or use --overwrite"
        )
    return args


def warn_about_ids(message: str, ids: list[str]) -> None:
    from ..audio.downloads import printable

    if ids:
        more = f" and {len(ids) - 20} more" if len(ids) > 20 else ""
        logger.warning("%s: %d: %s%s", message, len(ids), printable(", ".join(ids[:20])), more)


def record_of(file: str) -> dict[str, Any] | None:
    """Returns the record of `decode` about texts; `None` without a record, or if the record is about other texts."""
    from ..files import file_digest, read_record, record_path

    record = read_record(file)
    if record is None or record["sha256"] == file_digest(file):
        return record
    logger.warning(
        "%s is about other texts than those in %s; the score has no record of decoding", record_path(file), file
    )
    return None


def score(args: argparse.Namespace) -> None:
    from ..data import transcripts
    from ..data.bad_rows import BadRows
    from ..data.file_lists import expand_paths
    from ..data.hotword_lists import parse_word_list
    from ..data.kaldi import read_scp
    from ..evaluation import confidence, frequency, report, scoring, statistics
    from ..evaluation import hotword_scores as hotwords
    from ..evaluation import report_audio as recordings
    from ..files import atomic_write, file_digest
    from ..version import __version__

    reference = transcripts.read_transcripts(args.reference, required=True)
    hypotheses = transcripts.read_transcripts(args.hypothesis).texts
    other_hypotheses = transcripts.read_transcripts(args.compare).texts if args.compare else {}
    datasets = transcripts.read_map(args.utt2dataset) if args.utt2dataset else {}
    languages = transcripts.read_map(args.utt2lang) if args.utt2lang else {}
    words = parse_word_list(args.hotwords)
    lists: dict[str | None, Mapping[str, Any]] = {args.hypothesis: hypotheses, args.compare: other_hypotheses}
    lists |= {args.utt2dataset: datasets, args.utt2lang: languages}
    sources = reference.recordings
    if args.scp_file:
        bad_rows = BadRows(max_bad_fraction=1.0)
        scp = read_scp(args.scp_file, bad_rows)
        bad_rows.check(len(scp.entries) + len(bad_rows))
        sources = lists[args.scp_file] = {entry.id: entry.value for entry in scp.entries}
    if args.utt2dur:
        durations = lists[args.utt2dur] = transcripts.read_durations(args.utt2dur)
    transcripts.require_common_ids(args.reference, reference.texts, lists)
    train_files = [file for files in expand_paths(args.train_file or []) for file in files]

    # Counts.
    options = {"normalize": not args.no_normalize, "num_workers": args.num_workers}
    utterances = scoring.score_utterances(
        reference.texts, hypotheses, languages=languages, datasets=datasets, **options
    )
    result = scoring.score_set(utterances, args.num_resamples, args.seed)
    result["files"] = {"reference": args.reference, "hypothesis": args.hypothesis}
    result["files"] |= {"utt2lang": args.utt2lang} if args.utt2lang else {}
    result["sha256"] = {kind: file_digest(file) for kind, file in result["files"].items()}
    result["decoding"] = record_of(args.hypothesis)
    result["normalized"] = not args.no_normalize
    result["hf_speechllm"], result["date"] = __version__, date.today().isoformat()
    result["missing_hypotheses"] = [id_ for id_ in reference.texts if id_ not in hypotheses]
    result["extra_hypotheses"] = [id_ for id_ in hypotheses if id_ not in reference.texts]
    warn_about_ids("references without a hypothesis, counted as deletions", result["missing_hypotheses"])
    warn_about_ids("hypotheses without a reference, not scored", result["extra_hypotheses"])
    warn_about_ids("empty references, for which every word is an insertion", result["empty_references"])
    if datasets:
        warn_about_ids(f"IDs not in {args.utt2dataset}", [id_ for id_ in reference.texts if id_ not in datasets])

    comparison, others, absent = None, [], []
    if args.compare:
        others = scoring.rescore(utterances, other_hypotheses, **options)
        errors, other_errors = ([u.counts.errors for u in scored] for scored in (utterances, others))
        tokens = [u.counts.reference_tokens for u in utterances]
        comparison = statistics.compare_systems(errors, other_errors, tokens, args.num_resamples, args.seed)
        rate = sum((u.counts for u in others), scoring.ErrorCounts()).rate
        absent = [id_ for id_ in reference.texts if id_ not in other_hypotheses]
        warn_about_ids(f"references not in {args.compare}, counted as deletions", absent)
        result["comparison"] = {"file": args.compare, "rate": rate, **comparison._asdict(), "missing": absent}
        result["comparison"] |= {"sha256": file_digest(args.compare), "decoding": record_of(args.compare)}
    counted = []
    if words or any(reference.hotwords.values()):
        counted = hotwords.count_hotwords(utterances, words, reference.hotwords, **options)
        result["hotwords"] = hotwords.summarize(counted)

    if train_files:
        occurrences, numbers = frequency.read_occurrences(train_files, utterances, **options)
        found = frequency.summarize(utterances, occurrences)
        result["training_frequency"] = {"files": args.train_file, **numbers, **found}
        if comparison:
            result["comparison"]["training_frequency"] = frequency.summarize(others, occurrences)
        parts: dict[str, list[scoring.ScoredUtterance]] = {}
        for utterance in utterances:
            parts.setdefault(utterance.dataset, []).append(utterance)
        for name, part in parts.items() if len(parts) > 1 else ():
            result["datasets"][name]["training_frequency"] = frequency.summarize(part, occurrences)

    judged = []
    if args.words:
        found = confidence.read_words(args.words)
        lists = {args.words: found}
        transcripts.require_common_ids(args.reference, reference.texts, lists)
        judged = confidence.judge_words(utterances, found, not args.no_normalize)
        result["confidence"] = confidence.summarize(judged)
    calibration = confidence.fit(judged)

    # Recordings.
    wanted = {id_: source for id_, source in sources.items() if id_ in reference.texts}
    if not args.utt2dur:
        durations, reasons = recordings.measure_durations(wanted)
        warn_about_ids("unreadable recordings", list(reasons.values()))
    if all(id_ in durations for id_ in reference.texts):
        result["seconds"] = sum(durations[id_] for id_ in reference.texts)
    examples = report.choose_examples(utterances, args.num_worst, result["missing_hypotheses"], others, absent)
    heard = [id_ for id_ in examples.ids() if id_ in wanted and not args.no_audio]
    page = report.html_report(
        result, utterances, reference.texts, hypotheses, examples, durations,
        sounds={id_: recordings.embed_sound(wanted[id_]) for id_ in heard}, hotwords=counted, comparison=comparison,
        others=others, other_hypotheses=other_hypotheses, words=judged,
    )  # fmt: skip

    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "cer.txt") as file:
        report.write_compute_wer(utterances, len(result["missing_hypotheses"]), len(result["extra_hypotheses"]), file)
    with atomic_write(folder / "score.json") as file:
        json.dump(result, file, ensure_ascii=False, indent=1)
    with atomic_write(folder / "report.html") as file:
        file.write(page)
    facts: dict[str, Any] = {}
    (folder / UNSEEN_WORDS).unlink(missing_ok=True)  # of an earlier score
    if train_files:
        with atomic_write(folder / UNSEEN_WORDS) as file:
            file.writelines(f"{row['word']}\n" for row in result["training_frequency"]["unseen_words"])
        facts |= frequency.describe(result, str(folder / UNSEEN_WORDS))
    if calibration is not None:
        with atomic_write(folder / "confidence.json") as file:
            json.dump(calibration.save(), file, indent=1)
        facts["calibration"] = f"{folder / 'confidence.json'}, for decode --confidence_file"
    low, high = (100 * end for end in result["interval_95"])
    facts = {result["metric"]: f"{100 * result['rate']:.2f} % (95 %: {low:.2f} to {high:.2f})", **facts}
    if comparison:
        points = [100 * value for value in comparison[:3]]
        facts["compared"] = "{:+.2f} points (95 %: {:+.2f} to {:+.2f})".format(*points) + f" against {args.compare}"
    print_summary({**facts, "written": [str(folder / name) for name in args.outputs]})


def main() -> None:
    args = parse_arguments()
    show_log()
    try:
        score(args)
    except (OSError, ValueError) as error:
        sys.exit(f"{prog()}: error: {error}")
