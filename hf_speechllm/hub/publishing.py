"""Publishing of a trained model: what its readers need, and nothing that is private to the run."""

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
    """Uploads model or adapters, processor, card and training curve; may be repeated if it breaks off.

    A model gets the layout of transformers' `fun_asr_nano` where that class computes the same, else ours, with this
    package's code. Adapters of a base model that only this machine has are merged into it first: nobody else could
    load them. Nothing else of the folder is published: it also holds optimizer states, `training_args.bin`, which
    pickles paths of the machine and the token, and `trainer_state.json`, which names folders.

    Args:
        folder: output folder of a training run, or a model in any layout.
        repo_id: `USER/MODEL`; created if it is not there.
        private: of a new repository; `None` as the account's default says.
        token: default the one of `hf auth login`.
        revision: branch, default `main`.
    """
    folder = Path(folder)
    with tempfile.TemporaryDirectory() as temporary:
        stage, card = Path(temporary), read_card(folder)
        processor = SpeechLLMProcessor.from_pretrained(folder)
        if _base_is_on_hub(folder):
            in_native = False
            for name in (adapters.CONFIG_FILE, adapters.WEIGHTS_FILE):
                shutil.copy(folder / name, stage)
            processor.save_pretrained(stage)
            write_code(stage)
            card = card or f"---\ntags: {json.dumps([*TAGS, 'lora'])}\n---\n"
        else:
            if (folder / adapters.CONFIG_FILE).is_file():
                logger.info("%s: its base model is not on the Hub, so the merged model is published", folder)
            checkpoint = read_checkpoint(folder)
            in_native = write_model(checkpoint, processor, stage)
            card = card or plain_card(repo_id, checkpoint, checkpoint.config.name_or_path)
        (stage / CARD_FILE).write_text(f"{card.rstrip()}\n\n{layout_note(repo_id, in_native)}\n", encoding="utf-8")
        if (folder / CURVE_FILE).is_file():
            shutil.copy(folder / CURVE_FILE, stage)
        return upload(stage, repo_id, private, token, revision=revision, commit_message=commit_message)


def _base_is_on_hub(folder: Path) -> bool:
    """Whether a folder holds adapters of a base model that everybody can load."""
    if not (folder / adapters.CONFIG_FILE).is_file():
        return False
    with base_model(folder / adapters.CONFIG_FILE) as name:
        return hub_id(name) is not None
