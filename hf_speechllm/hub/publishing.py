"""Publishing of a trained model, without files that are private to the training run."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import yaml
from huggingface_hub import CommitInfo, ModelCard, ModelCardData, eval_result_entries_to_yaml

from ..formats import peft_adapters as adapters
from ..formats.loading import read_checkpoint
from ..formats.untrusted import base_model
from ..model.configuration import SpeechLLMConfig
from ..model.native_families import FAMILIES
from ..model.processing import SpeechLLMProcessor
from .markdown import escape
from .results import Result, eval_entries, eval_results, results_section
from .upload import CARD_FILE, TAGS, hub_id, layout_note, plain_card, read_card, upload, usage, write_code, write_model

logger = logging.getLogger(__name__)

CURVE_FILE = "training_curve.png"  # in an output folder
RESULTS_FOLDER = ".eval_results"  # in a repository


@dataclasses.dataclass(frozen=True)
class CardOptions:
    """What a card says beyond the training run.

    Args:
        results: scores of the model; see `results.read_result`.
        language: ISO codes; default: those of the existing card, otherwise of the results.
        licence: SPDX id, or another licence id of the Hub; default: that of the existing card.
        datasets: Hub ids of training data; default: those of the existing card.
    """

    results: Sequence[Result] = ()
    language: Sequence[str] = ()
    licence: str | None = None
    datasets: Sequence[str] = ()


def publish(
    folder: str | Path,
    repo_id: str,
    private: bool | None = True,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "End of training",
    options: CardOptions = CardOptions(),
) -> CommitInfo:
    """Uploads model or adapters, processor, card and training curve. After an interruption, call this again.

    A model is uploaded in the layout of transformers' `fun_asr_nano` if it computes the same results there. Otherwise
    it is uploaded in the layout of this package, with the package's code. Adapters of a local base model are merged
    into it first, because no other machine could load them. Other files are not published: optimizer states,
    `training_args.bin` (contains local paths and the token) and `trainer_state.json` (contains local paths).

    Args:
        folder: output folder of a training run, or a model in any layout.
        repo_id: `USER/MODEL`; created if missing.
        private: visibility of a new repository; `None`: default of the account.
        token: default: the token of `hf auth login`.
        revision: branch; default: `main`.
        commit_message: message of the commit.
        options: of the card.

    Returns:
        The commit, as returned by `HfApi.upload_folder`.

    Raises:
        ValueError: if the card of the folder contains figures in a `model-index`, whose files are unknown.
    """
    folder = Path(folder)
    with tempfile.TemporaryDirectory() as temporary:
        stage, card = Path(temporary), read_card(folder)
        processor = SpeechLLMProcessor.from_pretrained(folder)
        if _base_is_on_hub(folder):
            in_native, checkpoint = False, None
            for name in (adapters.CONFIG_FILE, adapters.WEIGHTS_FILE):
                shutil.copy(folder / name, stage)
            processor.save_pretrained(stage)
            write_code(stage)
            card = card or adapter_card(repo_id, folder)
        else:
            if (folder / adapters.CONFIG_FILE).is_file():
                logger.info("%s: the base model is not on the Hub; uploading the merged model", folder)
            checkpoint = read_checkpoint(folder)
            in_native = write_model(checkpoint, processor, stage)
            card = card or plain_card(repo_id, checkpoint, checkpoint.config.name_or_path)
        card = complete_card(rename_card(card, repo_id), repo_id, options)
        for name, entries in eval_entries(options.results).items():
            (stage / RESULTS_FOLDER).mkdir(exist_ok=True)
            content = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
            (stage / RESULTS_FOLDER / f"{name}.yaml").write_text(content, encoding="utf-8")
        (stage / CARD_FILE).write_text(
            f"{card.rstrip()}\n\n{layout_note(repo_id, in_native, checkpoint)}\n", encoding="utf-8"
        )
        if (folder / CURVE_FILE).is_file():
            shutil.copy(folder / CURVE_FILE, stage)
        return upload(stage, repo_id, private, token, revision=revision, commit_message=commit_message)


def adapter_card(repo_id: str, folder: Path) -> str:
    """Builds the card of adapters without information about their training."""
    with base_model(folder / adapters.CONFIG_FILE) as base:
        front_matter = ModelCardData(
            library_name="transformers", base_model=base, tags=[*TAGS, "lora"], pipeline_tag=TAGS[0]
        )
        origin = f"[{base}](https://huggingface.co/{base})"
    return (
        f"---\n{front_matter.to_yaml()}\n---\n\n# {escape(repo_id.split('/')[-1])}\n\n"
        f"Low-rank adapters (LoRA) of the speech LLM {origin}.\n\n{usage(repo_id)}\n"
    )


def rename_card(card: str, repo_id: str) -> str:
    """Replaces the name of an output folder or of another repository in title and usage of a card by a Hub id.

    Text that a user has changed stays.
    """
    found = re.search(r"ForConditionalGeneration\.from_pretrained\((\".*\")\)", card)
    old = json.loads(found[1]) if found else None
    if not old or old == repo_id:
        return card
    title = f"# {escape(old.split('/')[-1])}"
    card = re.sub(rf"^{re.escape(title)}$", lambda _: f"# {escape(repo_id.split('/')[-1])}", card, count=1, flags=re.M)
    for model_type in (SpeechLLMConfig.model_type, *FAMILIES):
        card = card.replace(usage(old, model_type), usage(repo_id, model_type))
    return card


def complete_card(text: str, repo_id: str, options: CardOptions) -> str:
    """Adds language, licence, data sets and results to a card.

    Raises:
        ValueError: if the card contains figures in a `model-index`.
    """
    card = ModelCard(text)
    data = cast(ModelCardData, card.data)
    if data.eval_results:
        raise ValueError(
            f"{CARD_FILE} of the model has a model-index, and the files behind its figures are unknown; remove the "
            "model-index, and pass --score with the folder that hf-speechllm score wrote"
        )
    measured = list(dict.fromkeys(language for result in options.results for language in result.languages))
    data.language = list(options.language) or data.language or measured or None
    data.license = options.licence or data.license
    data.datasets = list(options.datasets) or data.datasets
    if options.results:
        data.model_name = repo_id.split("/")[-1]
        data.eval_results = eval_results(options.results)
        base = data.base_model if isinstance(data.base_model, str) else None
        start, heading, rest = card.text.rstrip().partition("\n## ")
        card.text = f"{start.rstrip()}\n\n{results_section(options.results, base)}\n{heading}{rest}\n"
    return str(card)


def _base_is_on_hub(folder: Path) -> bool:
    """Returns whether a folder contains adapters of a base model on the Hub."""
    if not (folder / adapters.CONFIG_FILE).is_file():
        return False
    with base_model(folder / adapters.CONFIG_FILE) as name:
        return hub_id(name) is not None
