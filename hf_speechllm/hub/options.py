"""Options about publishing: those of `TrainingArguments`, private by default and without checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import option


@dataclass
class PublishingOptions:
    """Publishing"""

    push_to_hub: bool = option(False, "Publish the finished model on the Hub.")
    hub_model_id: str | None = option(None, "USER/MODEL on the Hub (default: the name of --output_dir).")
    hub_private_repo: bool | None = option(True, "Whether a repository that --push_to_hub creates is private.")
    hub_strategy: str = option("end", "Must stay `end`: the finished model is pushed, checkpoints are not.")

    def check_publishing(self) -> None:
        """Refuses to publish checkpoints.

        Raises:
            ValueError: if `hub_strategy` is not `end`.
        """
        if self.hub_strategy != "end":
            raise ValueError(
                f"--hub_strategy {self.hub_strategy} would publish optimizer states and pickled options with the "
                "token and paths of this machine; only `end` is offered"
            )
