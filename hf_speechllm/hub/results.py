"""Scores of a model for its card: read from score.json, checked against the files behind them, in the Hub's forms."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry

from ..data.transcripts import read_map, read_transcripts
from ..evaluation.languages import known_language
from ..evaluation.scoring import ErrorCounts, metric_of, rescore, score_utterances
from ..files import file_digest, read_record, record_path
from ..options import usable_cores
from .markdown import code, table
from .upload import TAGS, hub_id

SCORE_FILE = "score.json"
METRIC_NAMES = {"WER": "Word error rate", "CER": "Character error rate", "MER": "Mixed error rate"}
MODEL_FINGERPRINT = ("weights", "configuration", "processor")
DTYPES = ("bfloat16", "float32")  # of decode
PACKAGES = ("hf_speechllm", "transformers", "tokenizers")  # their releases change the fingerprint of equal models


@dataclass(frozen=True)
class Result:
    """The score of a model on a data set.

    Args:
        dataset: Hub id or another name.
        config, split: of a data set on the Hub, if known.
        path: the score.json.
        score: its content.
    """

    dataset: str
    config: str | None
    split: str | None
    path: Path
    score: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Data set, config and split, joined by colons."""
        return ":".join(filter(None, (self.dataset, self.config, self.split)))

    @property
    def record(self) -> Mapping[str, Any] | None:
        """What `decode` recorded about the hypotheses; `None` if another program made these."""
        return self.score["decoding"]

    @property
    def value(self) -> float:
        """The error rate in percent."""
        return percent(self.score["rate"])

    @property
    def languages(self) -> list[str]:
        """Codes of the languages of the references."""
        names = [part for name in self.score["languages"] for part in name.split("+")]
        codes = [known if (known := known_language(name)) not in ("", "other") else name for name in names]
        return [name for name in dict.fromkeys(codes) if re.fullmatch("[a-z]{2,3}", name)]


def percent(rate: float) -> float:
    """Returns a rate in percent, with two decimals."""
    return round(100 * rate, 2)


def read_results(arguments: Sequence[str]) -> list[Result]:
    """Reads several scores; arguments and errors as for `read_result`.

    Raises:
        ValueError: also if two scores have the same name.
    """
    results: dict[str, Result] = {}
    for argument in arguments:
        result = read_result(argument)
        if other := results.get(result.name):
            raise ValueError(
                f"--score: {other.path} and {result.path} have the same name, {result.name}; pass NAME=DIR with "
                "different names"
            )
        results[result.name] = result
    return list(results.values())


def read_result(argument: str) -> Result:
    """Reads a score, checks that the files that it was made from exist and are unchanged, and counts their errors.

    Args:
        argument: `DIR`, or `NAME=DIR` with the folder (or score.json) that `hf-speechllm score` wrote. The name of a
            data set on the Hub is `ORG/NAME`, `ORG/NAME:CONFIG` or `ORG/NAME:CONFIG:SPLIT`. The default is the name of
            the folder.

    Raises:
        ValueError: if a file is missing or has changed, the score is damaged, or the files give other figures.
        OSError: if a file cannot be read.
    """
    name, folder = _split_argument(argument)
    path = Path(folder) / SCORE_FILE if Path(folder).is_dir() else Path(folder)
    if not path.is_file():
        raise ValueError(
            f"--score {argument}: no {SCORE_FILE} in {folder}; pass the --output_dir of hf-speechllm score"
        )
    dataset, _, rest = (name or path.resolve().parent.name).partition(":")
    config, _, split = rest.partition(":")
    try:
        score = json.loads(path.read_text(encoding="utf-8"))
        result = Result(dataset, config or None, split or None, path, score)
        _check_form(result)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a score of this release; run hf-speechllm score again") from error
    files = {kind: _find(file, score["sha256"][kind], path) for kind, file in score["files"].items()}
    _check_record(path, files["hypothesis"], score["decoding"])
    comparison = score.get("comparison")
    if comparison:
        files["comparison"] = _find(comparison["file"], comparison["sha256"], path)
        _check_record(path, files["comparison"], comparison["decoding"])
    _check_figures(result, files)
    return result


def _split_argument(argument: str) -> tuple[str, str]:
    """Splits `NAME=DIR` at the first `=` before an existing path, which may contain `=`; the name may be empty."""
    parts = argument.split("=")
    for number in range(len(parts)):
        folder = "=".join(parts[number:])
        if folder and Path(folder).exists():
            return "=".join(parts[:number]), folder
    name, _, folder = argument.partition("=")
    return (name, folder) if folder else ("", name)


def _check_form(result: Result) -> None:
    """Raises an exception if a value that a card or a check needs is missing or has another type."""
    score = result.score
    low, high = score["interval_95"]
    if not all(math.isfinite(value) for value in (low, high, score["rate"], score.get("seconds", 0))):
        raise ValueError("numbers that are not finite")
    comparison = score.get("comparison")
    for kind, file in {"reference": None, "hypothesis": None, **score["files"]}.items():
        Path(file), score["sha256"][kind]
    if comparison:
        Path(comparison["file"]), comparison["sha256"], comparison["rate"]
    for record in filter(None, (score["decoding"], comparison and comparison["decoding"])):
        record["sha256"], record["model"], *(record["settings"][name] for name in MODEL_FINGERPRINT)
        if record["settings"]["dtype"] not in DTYPES:
            raise ValueError("unknown dtype")
    # Makes the texts of a card, because these read most values.
    _ = result.languages
    eval_results([result])
    eval_entries([result])
    results_section([result], None)


def _find(file: str, digest: str, score_file: Path) -> Path:
    """Returns a file named by a score, relative to the working folder or to a folder above the score.

    Raises:
        ValueError: if the file is missing, or no file of this name has the digest.
    """
    places = [Path(file), *(folder / file for folder in score_file.resolve().parents)]
    found = [place for place in places if place.is_file()]
    if not found:
        raise ValueError(f"{score_file}: the figures have no file behind them: {file} is missing; restore the file")
    for place in found:
        if file_digest(place) == digest:
            return place
    raise ValueError(f"{score_file}: {found[0]} has changed since it was scored; run hf-speechllm score again")


def _check_record(score_file: Path, texts: Path, record: Mapping[str, Any] | None) -> None:
    """Raises an error if the record in a score is about other texts, or differs from the record beside the texts."""
    digest, written = file_digest(texts), read_record(texts)
    known = record or written
    if known is not None and known["sha256"] != digest:
        raise ValueError(
            f"{score_file}: {texts} does not contain the texts that hf-speechllm decode wrote: the file was edited or "
            "replaced; decode and score again"
        )
    if written is not None and written["sha256"] == digest and written != record:
        raise ValueError(
            f"{score_file}: `decoding` differs from {record_path(texts)}: a file was edited, or the texts were "
            "decoded again; run hf-speechllm score again"
        )


def _check_figures(result: Result, files: Mapping[str, Path]) -> None:
    """Counts errors again, from the files, and raises an error if the score has other figures."""
    score = result.score
    reference, hypotheses = (read_transcripts(files[kind]).texts for kind in ("reference", "hypothesis"))
    languages = read_map(files["utt2lang"]) if "utt2lang" in files else {}
    options = {"normalize": score["normalized"], "num_workers": usable_cores()}
    utterances = score_utterances(reference, hypotheses, languages=languages, **options)
    total = sum((utterance.counts for utterance in utterances), ErrorCounts())
    counted = {
        **{name: getattr(total, name) for name in ("substitutions", "deletions", "insertions", "reference_tokens")},
        "metric": metric_of(utterances),
        "utterances": len(utterances),
        "missing_hypotheses": [id_ for id_ in reference if id_ not in hypotheses],
    }
    wrong = [name for name, value in counted.items() if score[name] != value]
    wrong += ["languages"] if set(score["languages"]) != {utterance.language for utterance in utterances} else []
    wrong += ["rate"] if not math.isclose(score["rate"], total.rate, abs_tol=1e-9) else []
    low, high = score["interval_95"]
    if not 0 <= low <= total.rate + 1e-9 or not total.rate - 1e-9 <= high:
        wrong.append("interval_95")
    if "comparison" in files:
        others = rescore(utterances, read_transcripts(files["comparison"]).texts, **options)
        rate = sum((utterance.counts for utterance in others), ErrorCounts()).rate
        wrong += ["comparison.rate"] if not math.isclose(score["comparison"]["rate"], rate, abs_tol=1e-9) else []
    if wrong:
        raise ValueError(
            f"{result.path}: {', '.join(wrong)}: not the figures of the files: the score was edited, or made by "
            "another release; run hf-speechllm score again"
        )


def check_model(result: Result, fingerprint: Mapping[str, str]) -> None:
    """Checks that the scored texts are texts of the model that is published.

    Args:
        result: with a record of `decode`.
        fingerprint: of the model, in the dtype of the record; see `inference.stamp.model_fingerprint`.

    Raises:
        ValueError: if the texts come from another model.
    """
    settings = (result.record or {})["settings"]
    same_packages = all(settings.get(name) == fingerprint.get(name) for name in PACKAGES)
    for name in MODEL_FINGERPRINT if same_packages else MODEL_FINGERPRINT[:1]:
        if settings[name] != fingerprint[name]:
            raise ValueError(
                f"{result.path}: the texts in {result.score['files']['hypothesis']} come from another model "
                f"({(result.record or {})['model']}; {name} differ); decode with this model and score again"
            )


def model_name(record: Mapping[str, Any] | None) -> str:
    """Returns the Hub id or the name of the folder of the model that made texts; empty if unknown."""
    return "" if record is None else hub_id(record["model"]) or Path(record["model"]).resolve().name


def decoding_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of `decode` for a card; prompts and hotwords may be private and are only mentioned."""
    settings = record["settings"]
    shown = {"search": "greedy" if settings["num_beams"] == 1 else f"{settings['num_beams']} beams"}
    if weight := settings.get("ctc_weight"):
        shown["search"] += f", rescored by the CTC head (weight {weight:g})"
    shown |= {name: settings[name] for name in ("max_new_tokens", "dtype", "language") if settings.get(name)}
    flags = ("vad", "hotwords", "context", "prompt", "no_itn", "repetition_guard", "ctc_guard", "ctc_draft")
    return shown | {name: True for name in flags if settings.get(name)}


def hardware(record: Mapping[str, Any]) -> str:
    """Returns the number of processes and their device."""
    return f"{record['processes']} x {record['device']}"


def real_time_factor(record: Mapping[str, Any]) -> float | None:
    """Returns audio seconds per second of decoding (RTFx); `None` if nothing was decoded."""
    seconds, elapsed = record["decoded_seconds"], record["elapsed_seconds"]
    return round(seconds / elapsed, 1) if seconds and elapsed else None


def normaliser(score: Mapping[str, Any]) -> str:
    """Returns the name of the normalisation of a score."""
    return f"hf_speechllm.normalize_text {score['hf_speechllm']}" if score["normalized"] else "none"


def eval_results(results: Sequence[Result]) -> list[EvalResult]:
    """Returns the results for the `model-index` of a card; rates are in percent."""
    return [
        EvalResult(
            task_type=TAGS[0],
            task_name="Automatic speech recognition",
            dataset_type=result.dataset,
            dataset_name=result.dataset,
            dataset_config=result.config,
            dataset_split=result.split,
            metric_type=result.score["metric"].lower(),
            metric_name=f"{METRIC_NAMES[result.score['metric']]} (%)",
            metric_value=result.value,
            metric_args=dict(_details(result)),
        )
        for result in results
    ]


def _details(result: Result) -> Iterator[tuple[str, Any]]:
    """Yields names and values of what a rate depends on."""
    score, record, comparison = result.score, result.record, result.score.get("comparison")
    yield "normaliser", normaliser(score)
    yield "interval_95", [percent(end) for end in score["interval_95"]]
    for name in ("substitutions", "deletions", "insertions", "reference_tokens", "utterances"):
        yield name, score[name]
    if "seconds" in score:
        yield "hours", round(score["seconds"] / 3600, 2)
    if score["missing_hypotheses"]:
        yield "missing_hypotheses", len(score["missing_hypotheses"])
    if comparison:
        name = model_name(comparison["decoding"])
        yield "compared_with", {**({"model": name} if name else {}), "value": percent(comparison["rate"])}
    if record is not None:
        yield "decoding", decoding_settings(record)
        yield "hardware", hardware(record)
        if factor := real_time_factor(record):
            yield "rtfx", factor


def eval_entries(results: Sequence[Result]) -> dict[str, list[EvalResultEntry]]:
    """Returns the entries for `.eval_results/NAME.yaml` by NAME; only of data sets with a Hub id.

    Format: https://huggingface.co/docs/hub/eval-results. The task of an entry is the config of the data set.
    """
    entries: dict[str, list[EvalResultEntry]] = {}
    for result in results:
        if "/" not in result.dataset or hub_id(result.dataset) is None:
            continue
        settings = decoding_settings(result.record) if result.record is not None else {}
        notes = [result.score["metric"] + " in %", f"normaliser: {normaliser(result.score)}"]
        notes += [f"split: {result.split}"] if result.split else []
        notes += [name if value is True else f"{name}: {value}" for name, value in settings.items()]
        entry = EvalResultEntry(
            dataset_id=result.dataset,
            task_id=result.config or "default",
            value=result.value,
            date=(result.record or result.score)["date"],
            notes="; ".join(notes),
        )
        entries.setdefault(result.dataset.replace("/", "--"), []).append(entry)
    return entries


def results_section(results: Sequence[Result], base: str | None) -> str:
    """Returns the section of a card about measured error rates.

    Args:
        base: Hub id of the base model, if known.
    """
    rows, notes = [], []
    for result in results:
        score, comparison = result.score, result.score.get("comparison")
        low, high = (percent(end) for end in score["interval_95"])
        cells = [code(result.name), score["metric"]]
        cells += [f"**{result.value:.2f} %**", f"{low:.2f} to {high:.2f} %", _compared(comparison, base)]
        cells += [f"{score['utterances']:,}", f"{score['seconds'] / 3600:.2f}" if "seconds" in score else ""]
        rows.append(cells)
        details = [f"normaliser: {normaliser(score)}"]
        if score["missing_hypotheses"]:
            details.append(f"{len(score['missing_hypotheses']):,} utterances without a text count as deletions")
        if result.record is None:
            details.append("no record says which model and settings made the texts")
        else:
            settings = decoding_settings(result.record).items()
            details += [name if value is True else f"{name}: {value}" for name, value in settings]
            factor = real_time_factor(result.record)
            details.append(hardware(result.record) + (f", {factor:g} times real time" if factor else ""))
        notes.append(f"- {cells[0]}: {'; '.join(details)}")
    header = ("data set", "metric", "error rate", "95 % interval", "compared with", "utterances", "hours")
    return "## Results\n" + table(header, rows) + "\n\n" + "\n".join(notes)


def _compared(comparison: Mapping[str, Any] | None, base: str | None) -> str:
    if not comparison:
        return ""
    name = model_name(comparison["decoding"])
    kind = "base model" if name and name == base else code(name) if name else "other texts"
    return f"{percent(comparison['rate']):.2f} % ({kind})"
