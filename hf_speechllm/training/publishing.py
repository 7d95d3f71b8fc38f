"""Publishing of a trained model: what its readers need, and nothing that is private to the run."""

from __future__ import annotations

import logging
import shutil
import tempfile
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi

from ..checkpoints import adapters
from ..modeling import SpeechLLMForConditionalGeneration
from .callbacks import CURVE_FILE
from .card import CARD_FILE, hub_id

logger = logging.getLogger(__name__)

# Named one by one: an output folder also holds optimizer states, `training_args.bin`, which pickles paths of the
# machine and the token, and `trainer_state.json`, which names folders.
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
)
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    adapters.CONFIG_FILE,
)


def publish(
    folder: str | Path,
    repo_id: str,
    private: bool | None = True,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "End of training",
) -> CommitInfo:
    """Uploads model or adapters, processor, card and training curve; may be repeated if it breaks off.

    Adapters of a base model that only this machine has are merged into it first: nobody else could load them.

    Args:
        folder: output folder of a training run.
        repo_id: `USER/MODEL`; created if it is not there.
        private: of a new repository; `None` as the account's default says.
        token: default the one of `hf auth login`.
        revision: branch, default `main`.
    """
    folder = Path(folder)
    api = HfApi(library_name="hf_speechllm", token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as merged:
        if _needs_merging(folder):
            logger.info("%s: its base model is not on the Hub, so the merged model is published", folder)
            SpeechLLMForConditionalGeneration.from_pretrained(folder).save_pretrained(merged)
            for name in _matching(folder, (*PROCESSOR_FILES, CARD_FILE, CURVE_FILE)):
                shutil.copy(folder / name, merged)
            folder = Path(merged)
        names = _matching(folder, (*MODEL_FILES, *PROCESSOR_FILES, CARD_FILE, CURVE_FILE))
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=names,
            commit_message=commit_message,
            revision=revision,
        )


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def _needs_merging(folder: Path) -> bool:
    return (folder / adapters.CONFIG_FILE).is_file() and hub_id(adapters.base_model(folder)) is None
