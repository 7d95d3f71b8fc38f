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
from dataclasses import dataclass
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
    """Parses the command line."""
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
    """Logs the number of IDs and the first ones, if there are any."""
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


@dataclass(frozen=True)
class Lists:
    """Contents of the lists of the command line, by ID; empty if a list is omitted."""

    reference: Any
    hypotheses: Mapping[str, str]
    other_hypotheses: Mapping[str, str]
    datasets: Mapping[str, str]
    languages: Mapping[str, str]
    sources: Mapping[str, Any]
    durations: Mapping[str, float]
    words: Mapping[str, Any]
    hotwords: list[str]
    train_files: list[str]


def score(args: argparse.Namespace) -> None:
    """Counts errors, and writes scores and report."""
    from ..evaluation import confidence, report, scoring
    from ..evaluation import hotword_scores as hotwords
    from ..evaluation import report_audio as recordings

    lists = read_lists(args)
    texts = lists.reference.texts
    options = {"normalize": not args.no_normalize, "num_workers": args.num_workers}
    utterances = scoring.score_utterances(
        texts, lists.hypotheses, languages=lists.languages, datasets=lists.datasets, **options
    )
    result = {**scoring.score_set(utterances, args.num_resamples, args.seed), **provenance(args)}
    result["missing_hypotheses"] = [id_ for id_ in texts if id_ not in lists.hypotheses]
    result["extra_hypotheses"] = [id_ for id_ in lists.hypotheses if id_ not in texts]
    warn_about_ids("references without a hypothesis, counted as deletions", result["missing_hypotheses"])
    warn_about_ids("hypotheses without a reference, not scored", result["extra_hypotheses"])
    warn_about_ids("empty references, for which every word is an insertion", result["empty_references"])
    if lists.datasets:
        warn_about_ids(f"IDs not in {args.utt2dataset}", [id_ for id_ in texts if id_ not in lists.datasets])

    others = scoring.rescore(utterances, lists.other_hypotheses, **options) if args.compare else []
    comparison = add_comparison(result, args, lists, utterances, others) if args.compare else None
    counted = []
    if lists.hotwords or any(lists.reference.hotwords.values()):
        counted = hotwords.count_hotwords(utterances, lists.hotwords, lists.reference.hotwords, **options)
        result["hotwords"] = hotwords.summarize(counted)
    if lists.train_files:
        add_training_frequency(result, args, lists.train_files, utterances, others)
    judged = confidence.judge_words(utterances, lists.words, not args.no_normalize) if args.words else []
    if args.words:
        result["confidence"] = confidence.summarize(judged)

    wanted = {id_: source for id_, source in lists.sources.items() if id_ in texts}
    durations = lists.durations
    if not args.utt2dur:
        durations, reasons = recordings.measure_durations(wanted)
        warn_about_ids("unreadable recordings", list(reasons.values()))
    if all(id_ in durations for id_ in texts):
        result["seconds"] = sum(durations[id_] for id_ in texts)
    absent = result["comparison"]["missing"] if comparison else []
    examples = report.choose_examples(utterances, args.num_worst, result["missing_hypotheses"], others, absent)
    heard = [id_ for id_ in examples.ids() if id_ in wanted and not args.no_audio]
    page = report.html_report(
        result, utterances, texts, lists.hypotheses, examples, durations,
        sounds={id_: recordings.embed_sound(wanted[id_]) for id_ in heard}, hotwords=counted, comparison=comparison,
        others=others, other_hypotheses=lists.other_hypotheses, words=judged,
    )  # fmt: skip
    facts = write_score(args, result, utterances, page, confidence.fit(judged))
    if comparison:
        points = [100 * value for value in comparison[:3]]
        facts["compared"] = "{:+.2f} points (95 %: {:+.2f} to {:+.2f})".format(*points) + f" against {args.compare}"
    print_summary({**facts, "written": [str(Path(args.output_dir) / name) for name in args.outputs]})


def read_lists(args: argparse.Namespace) -> Lists:
    """Reads all lists of the command line.

    Raises:
        OSError: if a list cannot be read.
        ValueError: if a list is invalid, or has no ID in common with the references.
    """
    from ..data import transcripts
    from ..data.bad_rows import BadRows
    from ..data.file_lists import expand_paths
    from ..data.hotword_lists import parse_word_list
    from ..data.kaldi import read_scp
    from ..evaluation import confidence

    reference = transcripts.read_transcripts(args.reference, required=True)
    sources = reference.recordings
    if args.scp_file:
        bad_rows = BadRows(max_bad_fraction=1.0)
        scp = read_scp(args.scp_file, bad_rows)
        bad_rows.check(len(scp.entries) + len(bad_rows))
        sources = {entry.id: entry.value for entry in scp.entries}
    lists = Lists(
        reference=reference,
        hypotheses=transcripts.read_transcripts(args.hypothesis).texts,
        other_hypotheses=transcripts.read_transcripts(args.compare).texts if args.compare else {},
        datasets=transcripts.read_map(args.utt2dataset) if args.utt2dataset else {},
        languages=transcripts.read_map(args.utt2lang) if args.utt2lang else {},
        sources=sources,
        durations=transcripts.read_durations(args.utt2dur) if args.utt2dur else {},
        words=confidence.read_words(args.words) if args.words else {},
        hotwords=parse_word_list(args.hotwords),
        train_files=[file for files in expand_paths(args.train_file or []) for file in files],
    )
    by_file: dict[str | None, Mapping[str, Any]] = {
        args.hypothesis: lists.hypotheses, args.compare: lists.other_hypotheses, args.utt2dataset: lists.datasets,
        args.utt2lang: lists.languages, args.scp_file: lists.sources, args.utt2dur: lists.durations,
        args.words: lists.words,
    }  # fmt: skip
    transcripts.require_common_ids(args.reference, reference.texts, by_file)
    return lists


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what was scored: files with digests, the record of `decode`, versions, the date."""
    from ..files import file_digest
    from ..version import __version__

    files = {"reference": args.reference, "hypothesis": args.hypothesis}
    files |= {"utt2lang": args.utt2lang} if args.utt2lang else {}
    return {
        "files": files,
        "sha256": {kind: file_digest(file) for kind, file in files.items()},
        "decoding": record_of(args.hypothesis),
        "normalized": not args.no_normalize,
        "hf_speechllm": __version__,
        "date": date.today().isoformat(),
    }


def add_comparison(
    result: dict[str, Any], args: argparse.Namespace, lists: Lists, utterances: list, others: list
) -> Any:
    """Adds the comparison with other hypotheses to a score, and returns the difference."""
    from ..evaluation import scoring, statistics
    from ..files import file_digest

    errors, other_errors = ([u.counts.errors for u in scored] for scored in (utterances, others))
    tokens = [u.counts.reference_tokens for u in utterances]
    comparison = statistics.compare_systems(errors, other_errors, tokens, args.num_resamples, args.seed)
    rate = sum((u.counts for u in others), scoring.ErrorCounts()).rate
    absent = [id_ for id_ in lists.reference.texts if id_ not in lists.other_hypotheses]
    warn_about_ids(f"references not in {args.compare}, counted as deletions", absent)
    result["comparison"] = {"file": args.compare, "rate": rate, **comparison._asdict(), "missing": absent}
    result["comparison"] |= {"sha256": file_digest(args.compare), "decoding": record_of(args.compare)}
    return comparison


def add_training_frequency(
    result: dict[str, Any], args: argparse.Namespace, files: list[str], utterances: list, others: list
) -> None:
    """Adds errors by training frequency to a score: of all utterances, of other hypotheses, of each data set."""
    from ..evaluation import frequency

    occurrences, numbers = frequency.read_occurrences(files, utterances, not args.no_normalize, args.num_workers)
    found = frequency.summarize(utterances, occurrences)
    result["training_frequency"] = {"files": args.train_file, **numbers, **found}
    if "comparison" in result:
        result["comparison"]["training_frequency"] = frequency.summarize(others, occurrences)
    parts: dict[str, list] = {}
    for utterance in utterances:
        parts.setdefault(utterance.dataset, []).append(utterance)
    for name, part in parts.items() if len(parts) > 1 else ():
        result["datasets"][name]["training_frequency"] = frequency.summarize(part, occurrences)


def write_score(
    args: argparse.Namespace, result: dict[str, Any], utterances: list, page: str, calibration: Any
) -> dict[str, Any]:
    """Writes the files of a score, and returns the lines of the summary."""
    from ..evaluation import frequency, report
    from ..files import atomic_write

    folder = Path(args.output_dir)
    with atomic_write(folder / "cer.txt") as file:
        report.write_compute_wer(utterances, len(result["missing_hypotheses"]), len(result["extra_hypotheses"]), file)
    with atomic_write(folder / "score.json") as file:
        json.dump(result, file, ensure_ascii=False, indent=1)
    with atomic_write(folder / "report.html") as file:
        file.write(page)
    low, high = (100 * end for end in result["interval_95"])
    facts = {result["metric"]: f"{100 * result['rate']:.2f} % (95 %: {low:.2f} to {high:.2f})"}
    (folder / UNSEEN_WORDS).unlink(missing_ok=True)  # of an earlier score
    if "training_frequency" in result:
        with atomic_write(folder / UNSEEN_WORDS) as file:
            file.writelines(f"{row['word']}\n" for row in result["training_frequency"]["unseen_words"])
        facts |= frequency.describe(result, str(folder / UNSEEN_WORDS))
    if calibration is not None:
        with atomic_write(folder / "confidence.json") as file:
            json.dump(calibration.save(), file, indent=1)
        facts["calibration"] = f"{folder / 'confidence.json'}, for decode --confidence_file"
    return facts


def main() -> None:
    """Runs the command; see the docstring of the module."""
    args = parse_arguments()
    show_log()
    try:
        score(args)
    except (OSError, ValueError) as error:
        sys.exit(f"{prog()}: error: {error}")
