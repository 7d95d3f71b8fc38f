"""Options about the model that is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import option


@dataclass
class ModelOptions:
    """Model"""

    model_name_or_path: str | None = option(
        None, "Model folder or Hub id: own, native (fun_asr_nano) or FunASR layout."
    )
    attn_implementation: str = option("sdpa", "Attention: sdpa, flash_attention_2 or eager.")
