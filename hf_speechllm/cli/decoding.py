"""Preparation of `decode`: requests, plan, transcriber."""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
from collections import Counter
from datetime import date
from typing import Any

import torch

from ..audio.vad import VoiceDetector
from ..data.bad_rows import BadRows
from ..formats.loading import load_config
from ..inference.ctc_reader import no_head
from ..inference.decoding import Outcome, Plan, plan_requests
from ..inference.distributed import Processes
from ..inference.journal import Journal
from ..inference.measuring import RequestMeter
from ..inference.requests import Request, requests_of_jsonl, requests_of_scp, requests_of_sources
from ..inference.stamp import model_fingerprint
from ..inference.transcriber import Transcriber
from ..model import chat
from ..model.calibration import Calibration
from ..model.modeling import SpeechLLMForConditionalGeneration
from ..model.processing import SpeechLLMProcessor
from .hotwords import read_hotwords

logger = logging.getLogger(__name__)

# Options that affect the texts: an unfinished run resumes only with the same values.
SETTINGS = (
    "language", "no_itn", "hotwords", "context", "prompt", "max_new_tokens", "num_beams", "repetition_guard",
    "word_times", "ctc_guard", "ctc_draft", "ctc_draft_threshold", "ctc_weight",
)  # fmt: skip
OPTIONS = (
    "batch_seconds", "max_new_tokens", "num_beams", "num_workers", "repetition_guard", "word_times", "ctc_guard",
    "ctc_draft", "ctc_draft_threshold", "ctc_weight",
)  # fmt: skip


def option_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options that affect the texts, for the journal; dtype and model are added later."""
    settings = {name: getattr(args, name) for name in SETTINGS} | {"vad": args.vad}
    if args.vad:
        settings |= {"vad_max_seconds": args.vad_max_seconds, "silero_vad": importlib.metadata.version("silero_vad")}
    return settings


def read_requests(args: argparse.Namespace, bad_rows: BadRows, processes: Processes) -> list[Request]:
    """Reads the requests; `bad_rows` collects unreadable entries.

    Raises:
        ValueError: if there are no requests, or an option is wrong.
        OSError: if a list cannot be read.
    """
    hotwords = read_hotwords(args.hotwords)
    prompt = chat.transcription_prompt(args.language, not args.no_itn, hotwords, args.prompt, args.context)
    if args.sources:
        requests = requests_of_sources(args.sources, prompt, bad_rows)
    elif args.scp_file:
        requests = requests_of_scp(args.scp_file, prompt, bad_rows, args.segments_file)
    else:
        is_own = args.language or args.no_itn or args.prompt or args.context or hotwords
        requests = requests_of_jsonl(args.jsonl_file, prompt if is_own else None, bad_rows)
    if not requests and not bad_rows:
        raise ValueError(f"{args.scp_file or args.jsonl_file}: no recordings; add lines to the list")
    repeated = [id_ for id_, count in Counter(request.id for request in requests).items() if count > 1]
    if (args.vad or args.word_times) and repeated:
        raise ValueError(
            f"two recordings have the ID {repeated[0]}, and --vad and --word_times write files named by ID; rename one"
        )
    if repeated and processes.rank == 0:
        logger.warning(
            "%d IDs are not unique, for example %s; `hf-speechllm score` refuses such a list",
            len(repeated),
            repeated[0],
        )
    return requests


def choose_device(device: str | None, dtype: str | None, local_rank: int = 0) -> tuple[str, str]:
    """Returns device and dtype; default the GPU of this process with bfloat16, otherwise the CPU with float32.

    Raises:
        ValueError: if the device is not usable.
    """
    on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    device = device or (f"cuda:{local_rank}" if on_gpu else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"--device {device} is not usable on this machine: {reason}; choose another device"
        ) from error
    return device, dtype or ("bfloat16" if device.startswith("cuda") else "float32")


def load_model(
    name: str, device: str | None, dtype: str | None
) -> tuple[SpeechLLMForConditionalGeneration, SpeechLLMProcessor]:
    """Loads model and processor for inference; see `choose_device`."""
    device, dtype = choose_device(device, dtype)
    model = SpeechLLMForConditionalGeneration.from_pretrained(name, dtype=getattr(torch, dtype))
    return model.to(device).eval(), SpeechLLMProcessor.from_pretrained(name)


def prepare(
    args: argparse.Namespace, requests: list[Request], journal: Journal, processes: Processes
) -> tuple[Plan, Transcriber | None]:
    """Plans the run and loads the transcriber; `None` if nothing must be decoded.

    Measures requests and compares options with an unfinished run before the model is loaded.

    Raises:
        ValueError: if the unfinished run has other settings, or the model or an option is wrong.
        OSError: if the model cannot be read.
    """
    name = args.model_name_or_path
    device, dtype = choose_device(args.device, args.dtype, processes.local_rank)
    vad = VoiceDetector(args.vad_max_seconds) if args.vad else None
    calibration = Calibration.read(args.confidence_file) if args.confidence_file else None
    journal.settings["calibration"] = calibration and calibration.save()
    processor = SpeechLLMProcessor.from_pretrained(name)
    config = load_config(name)
    uses_ctc = args.word_times or args.ctc_guard or args.ctc_draft or args.ctc_weight
    if uses_ctc and getattr(config, "ctc_head_config", None) is None:
        raise ValueError(no_head(config))
    journal.settings["dtype"] = dtype
    meter = RequestMeter(config, processor, vad.max_seconds if vad else None, args.num_workers)
    plan = plan_requests(requests, meter, journal, processes)
    if not plan.needs_model:
        return plan, None
    model = SpeechLLMForConditionalGeneration.from_pretrained(name, dtype=getattr(torch, dtype))
    stamps = processes.gather(model_fingerprint(model, processor, args.num_workers))
    if any(stamp != stamps[0] for stamp in stamps):
        raise ValueError(f"--model_name_or_path {name} has changed while the processes loaded it; start again")
    journal.require(stamps[0])
    options = {option: getattr(args, option) for option in OPTIONS} | {"calibration": calibration}
    transcriber = Transcriber(model.to(device), processor, vad=vad, fast=args.fast == "auto", **options)
    transcriber.rehearse(name)
    return plan, transcriber


def run_record(
    args: argparse.Namespace,
    journal: Journal,
    transcriber: Transcriber,
    outcome: Outcome,
    num_failed: int,
    processes: Processes,
) -> dict[str, Any]:
    """Returns what `push` and `score` need to know about texts: model, settings, device, amounts; ready for JSON.

    Args:
        num_failed: number of failed requests and of unreadable entries of the list.
    """
    device = transcriber.model.device
    return {
        "model": args.model_name_or_path,
        "settings": journal.settings,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
        "processes": processes.world_size,
        "texts": len(outcome.results),
        "failed": num_failed,
        # Of this run: a resumed run decodes the rest only.
        "decoded_seconds": round(outcome.seconds, 2),
        "elapsed_seconds": round(outcome.elapsed, 2),
        "date": date.today().isoformat(),
    }
