"""Model card and upload of the trainer."""

from __future__ import annotations

import logging

from huggingface_hub import CommitInfo
from transformers import Trainer

from ..hub.publishing import publish
from ..hub.upload import reporting_unreachable
from .arguments import SpeechLLMTrainingArguments
from .run_card import write_card
from .validation import Validator

logger = logging.getLogger(__name__)


class PublishingTrainer(Trainer):
    """A `Trainer` that publishes the model and the model card, without private files of the run."""

    args: SpeechLLMTrainingArguments
    current_scores: dict[str, float] | None
    selection: str | None
    validator: Validator

    def create_model_card(self, language=None, license=None, **kwargs) -> None:
        """Writes our model card into the output folder; ignores other options of the parent class.

        Logs a warning if the card cannot be written.
        """
        if self.is_world_process_zero():
            model = self.accelerator.unwrap_model(self.model)
            write_card(
                self.args, model, self.train_dataset, self.eval_dataset, self.state,
                name=self.hub_model_id, scores=self.current_scores, selection=self.selection,
                language=[language] if isinstance(language, str) else language, licence=license,
                rate_names=self.validator.rate_names,
            )  # fmt: skip

    def init_hf_repo(self, token: str | None = None, **options) -> None:
        """Creates the repository on the Hub; arguments as in the parent class.

        Raises:
            OSError: if the Hub refuses the repository, or cannot be reached.
        """
        with reporting_unreachable(self.args.hub_model_id or str(self.args.output_dir)):
            super().init_hf_repo(token, **options)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> CommitInfo | None:
        """Saves and publishes the model without optimizer states and `training_args.bin`, unlike the parent class.

        Args:
            blocking: must be true.
            private: default `args.hub_private_repo`.
            **kwargs: for `create_model_card`.
        """
        if not blocking:
            raise ValueError("push_to_hub(blocking=False) is not supported; leave `blocking` true")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        private = self.args.hub_private_repo if private is None else private
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        self.create_model_card(**kwargs)
        if not self.is_world_process_zero():
            return None
        folder = self.args.output_dir
        logger.info(
            "publishing %s as %s; to retry after an error: hf-speechllm push --input %s --hub_model_id %s",
            folder, self.hub_model_id, folder, self.hub_model_id,
        )  # fmt: skip
        revision = revision or self.args.hub_revision
        return publish(folder, self.hub_model_id, private, token, revision, commit_message or "End of training")
