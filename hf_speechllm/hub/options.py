"""Options for publishing: a subset of `TrainingArguments`, private by default and without checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import option


@dataclass
class PublishingOptions:
    """Publishing"""

    push_to_hub: bool = option(False, "Upload the final model to the Hub.")
    hub_model_id: str | None = option(None, "USER/MODEL on the Hub (default: name of --output_dir).")
    hub_private_repo: bool | None = option(True, "Create private repositories with --push_to_hub.")
    hub_strategy: str = option("end", "Only `end` is supported: upload the final model, no checkpoints.")

    def check_publishing(self) -> None:
        """Checks that only the final model is published.

        Raises:
            ValueError: if `hub_strategy` is not `end`.
        """
        if self.hub_strategy != "end":
            raise ValueError(
                f"--hub_strategy {self.hub_strategy} would publish optimizer states and pickled options with the "
                "token and paths of this machine; only `end` is supported"
            )
