"""Publishing of a trained model, without files that are private to the training run."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo

from ..formats import peft_adapters as adapters
from ..formats.loading import read_checkpoint
from ..formats.untrusted import base_model
from ..model.processing import SpeechLLMProcessor
from .upload import CARD_FILE, TAGS, hub_id, layout_note, plain_card, read_card, upload, write_code, write_model

logger = logging.getLogger(__name__)

CURVE_FILE = "training_curve.png"  # in an output folder


def publish(
    folder: str | Path,
    repo_id: str,
    private: bool | None = True,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "End of training",
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

    Returns:
        The commit, as returned by `HfApi.upload_folder`.
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
            card = card or f"---\ntags: {json.dumps([*TAGS, 'lora'])}\n---\n"
        else:
            if (folder / adapters.CONFIG_FILE).is_file():
                logger.info("%s: the base model is not on the Hub; uploading the merged model", folder)
            checkpoint = read_checkpoint(folder)
            in_native = write_model(checkpoint, processor, stage)
            card = card or plain_card(repo_id, checkpoint, checkpoint.config.name_or_path)
        (stage / CARD_FILE).write_text(
            f"{card.rstrip()}\n\n{layout_note(repo_id, in_native, checkpoint)}\n", encoding="utf-8"
        )
        if (folder / CURVE_FILE).is_file():
            shutil.copy(folder / CURVE_FILE, stage)
        return upload(stage, repo_id, private, token, revision=revision, commit_message=commit_message)


def _base_is_on_hub(folder: Path) -> bool:
    """Returns whether a folder contains adapters of a base model on the Hub."""
    if not (folder / adapters.CONFIG_FILE).is_file():
        return False
    with base_model(folder / adapters.CONFIG_FILE) as name:
        return hub_id(name) is not None
