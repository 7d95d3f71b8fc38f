"""Options of the model to load."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import option


@dataclass
class ModelOptions:
    """Model"""

    model_name_or_path: str | None = option(
        None, "Model folder or Hub id, in the layout of this package, transformers (fun_asr_nano) or FunASR."
    )
    attn_implementation: str = option("sdpa", "Attention implementation: sdpa, flash_attention_2 or eager.")
