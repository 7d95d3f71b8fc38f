"""Conversion of a corpus to `train.jsonl`, `dev.jsonl`, `test.jsonl` and a summary."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePath
from typing import Any

from ..audio.waveform import AudioError, check_root, display_name, is_url, local_path
from ..files import atomic_write
from ..model.chat import parse_messages
from .bad_rows import BadDataError, BadRows
from .jsonl import recording_id
from .preparation import RowMaker, prepare
from .sources import read_source, recognize
from .sources.reading import Reading
from .splits import own_splits, split_utterances
from .transcripts import read_transcripts
from .utterance import SPLITS, Utterance

logger = logging.getLogger(__name__)

SUMMARY_FILE = "summary.json"


def read_utterances(found: Iterable[Utterance], bad_rows: BadRows, audio_root: str | None = None) -> list[Utterance]:
    """Lists utterances.

    Args:
        found: utterances of a source.
        bad_rows: collects utterances with recordings outside `audio_root`.
        audio_root: folder that must contain all recordings.
    """
    if audio_root is None:
        return list(found)
    inside = []
    for utterance in found:
        try:
            for source in utterance.recordings:
                check_root(source, audio_root)
            inside.append(utterance)
        except AudioError as error:
            bad_rows.add(utterance.recording_file, utterance.recording_line, str(error))
    return inside


def read_texts(source: str) -> list[str]:
    """Returns the transcripts of a Kaldi `text`, of training rows (all answers), or of another local source.

    Raises:
        BadDataError: if the file has no transcripts, or is no such source.
        OSError: if the file cannot be read.
    """
    format = recognize(source)
    if format is None:
        texts = list(read_transcripts(source, required=True).texts.values())
    else:
        bad_rows = BadRows(1.0)
        texts = []
        for item in read_source(source, Reading(bad_rows), format):
            turns = [] if item.messages is None else parse_messages(item.messages).turns
            texts += [turn.answer or "" for turn in turns] or [item.transcript]
        bad_rows.check(len(texts) + len(bad_rows))
    if not any(texts):
        raise BadDataError(f"{source}: no transcripts; pass a list of lines `ID TEXT`, or a source of `prepare`")
    return [text for text in texts if text]


def warn_of_shared_recordings(utterances: Sequence[Utterance]) -> None:
    """Warns if rows have one whole recording and different transcripts: their times are probably not read."""
    texts: dict[str, str] = {}  # the first of each recording
    shared: dict[str, None] = {}
    for item in utterances:
        if item.messages is None:
            first = texts.setdefault(item.recording, item.transcript)
            if first.casefold() != item.transcript.casefold():
                shared[item.recording] = None
    if shared:
        logger.warning(
            "%d recordings are in several rows with different transcripts, for example %s; if the rows are parts of a "
            "recording, name the columns with their times in seconds: --columns start=NAME end=NAME",
            len(shared), display_name(next(iter(shared))),
        )  # fmt: skip


def name_utterances(utterances: Sequence[Utterance]) -> list[Utterance]:
    """Gives IDs to utterances without ID whose recordings have equal default IDs: the paths below the common folder.

    Example: `speaker1/001` and `speaker2/001` for `speaker1/001.wav` and `speaker2/001.wav`.
    """
    names = [utterance.id or recording_id(utterance.recording) for utterance in utterances]
    counts = Counter(names)
    folders = {
        index: os.path.dirname(local_path(item.recording))
        for index, item in enumerate(utterances)
        if not item.id and counts[names[index]] > 1 and not is_url(item.recording)
    }
    found = list(utterances)
    with contextlib.suppress(ValueError):  # no folders, or on two drives of Windows
        common = os.path.commonpath(folders.values())
        for index, folder in folders.items():
            below = PurePath(os.path.relpath(folder, common)).as_posix()
            if below != ".":
                found[index] = found[index]._replace(id=f"{below}/{names[index]}")
    return found


def choose_splits(
    utterances: Sequence[Utterance], shares: Sequence[float] | None, default: Sequence[float], seed: int
) -> tuple[list[str], str]:
    """Chooses the split of each utterance; also returns a description of the choice.

    Splits are drawn by speaker if speakers are known and there are at least as many as splits, otherwise by recording.

    Args:
        utterances: utterances of the source.
        shares: shares of the splits from the user; `None` uses the splits of the source, if any.
        default: shares for a source without splits.
        seed: seed of drawn splits.

    Raises:
        BadDataError: if only some rows of the source have a split: drawing could put its test rows in training.
    """
    without = sum(utterance.split is None for utterance in utterances)
    if not shares and without and {utterance.split for utterance in utterances} - {None, "train"}:
        raise BadDataError(
            f"the source has no split for {without} of {len(utterances)} rows; correct them (a split is called "
            "train, dev or test), or draw all splits with --split"
        )
    own = None if shares else own_splits(utterances)
    if own is not None:
        return own, "those of the source"
    shares = shares or default
    speakers = {utterance.speaker for utterance in utterances}
    if None not in speakers and len(speakers) < sum(share > 0 for share in shares):  # a split would be empty
        logger.warning(
            "fewer speakers (%d) than splits: recordings are divided, so scores are not those of new speakers",
            len(speakers),
        )
        utterances = [utterance._replace(speaker=None) for utterance in utterances]
        speakers = {None}
    by = "recording" if speakers == {None} else "speaker or recording" if None in speakers else "speaker"
    return split_utterances(utterances, shares, seed), f"drawn by {by}, seed {seed}"


def write_corpus(
    utterances: Sequence[Utterance], splits: Sequence[str], maker: RowMaker, output_dir: str, bad_rows: BadRows,
    num_workers: int, report: Callable[[int], Any] = lambda count: None,
) -> dict[str, Any]:  # fmt: skip
    """Checks all recordings and writes the rows of each split; writes no output if too many rows are bad.

    Args:
        utterances: utterances of all splits.
        splits: split of each utterance.
        maker: converts utterances to rows.
        output_dir: existing folder.
        bad_rows: collects bad rows; may contain bad rows of the source.
        num_workers: number of recordings to check at once.
        report: called with the number of checked utterances.

    Returns:
        A summary: rows, hours, speakers and tokens by split, languages, bad rows by kind.

    Raises:
        BadDataError: if more rows are bad than allowed, or no good row is left.
        ChildProcessError: if a process was killed.
        OSError: if a file cannot be written.
    """
    lines: dict[str, list[str]] = {}
    summary: dict[str, Any] = {"splits": {}}
    languages: Counter[str] = Counter()
    for split in SPLITS:
        chosen = [utterance for utterance, its in zip(utterances, splits, strict=True) if its == split]
        lines[split] = []
        seconds = num_tokens = 0.0
        good: list[bool] = []
        with contextlib.closing(prepare(chosen, maker, num_workers)) as parts:
            for part in parts:
                lines[split] += part.lines
                seconds += sum(part.seconds)
                num_tokens += part.num_tokens
                good += part.good
                for bad_row in part.bad:
                    bad_rows.add(*bad_row)
                report(len(part.good))
        kept = [utterance for utterance, is_good in zip(chosen, good, strict=True) if is_good]
        languages.update(utterance.language or "unknown" for utterance in kept)
        summary["splits"][split] = {
            "rows": len(kept),
            "hours": round(seconds / 3600, 4),
            "speakers": len({utterance.speaker for utterance in kept} - {None}),
            **({"tokens": int(num_tokens)} if maker.tokenizer is not None else {}),
        }
    total = sum(map(len, lines.values()))
    bad_rows.check(total + len(bad_rows))
    if not total:
        raise BadDataError("the source has no usable rows; check the source, --format and --columns")
    for split, rows in lines.items():
        path = os.path.join(output_dir, f"{split}.jsonl")
        if rows:
            with atomic_write(path) as file:
                file.writelines(rows)
        elif os.path.exists(path):  # of an earlier run
            os.unlink(path)
    summary |= {
        "languages": dict(languages.most_common()),
        "bad_rows": len(bad_rows),
        "bad_kinds": dict(bad_rows.kinds().most_common()),
    }
    return summary


def write_summary(summary: dict[str, Any], output_dir: str) -> None:
    """Writes the summary as JSON."""
    with atomic_write(os.path.join(output_dir, SUMMARY_FILE)) as file:
        json.dump(summary, file, ensure_ascii=False, indent=2)
        file.write("\n")
