"""Sets up the training of a CTC head: adds the head to the model, and chooses its vocabulary."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..data.column_values import read_column
from ..data.streaming import RowStream
from ..model import chat
from ..model.ctc import add_ctc_head, train_ctc_head
from ..model.ctc_configuration import CTCHeadConfig
from ..model.ctc_vocabulary import CTCVocabulary, character_config
from ..model.native_families import CTC_HEAD, is_native

if TYPE_CHECKING:
    from .options import TrainedPartsOptions

logger = logging.getLogger(__name__)

FRAME_SECONDS = 0.02  # wanted time between two frames of a head over characters, of which English has 15 per second


def prepare_ctc_head(model, processor, rows: Any, parts: TrainedPartsOptions) -> CTCVocabulary | None:
    """Adds a CTC head according to `--ctc_head`, unless the model has one, and makes the head trainable.

    Args:
        model: after freezing.
        processor: of the model.
        rows: training rows, whose transcripts define the vocabulary `characters`.
        parts: options of the trained parts.

    Returns:
        Vocabulary of the head, for the collators; `None` without `--ctc_head`.

    Raises:
        ValueError: if the model has a head of another type or vocabulary, or there are no characters.
    """
    if parts.ctc_head is None:
        if getattr(model, CTC_HEAD, None) is not None:
            model.ctc_head.requires_grad_(False)  # merging of an adapter unfreezes all parts
        return None
    if is_native(model):
        raise ValueError(
            f"--ctc_head: {model.config.model_type} models of transformers have no CTC head; leave it out"
        )
    if model.ctc_head is None:
        add_ctc_head(model, _new_config(model, processor, rows, parts))
    config = model.config.ctc_head_config
    for option, found in (("ctc_head", config.head_type), ("ctc_vocabulary", config.vocabulary)):
        if getattr(parts, option) not in ("auto", found):
            raise ValueError(f"--{option} {getattr(parts, option)}: the model has a CTC head of {found}; set auto")
    train_ctc_head(model, parts.ctc_weight, parts.only_ctc_head)
    logger.info(
        "CTC head: %s, %d %s, %d output frames per encoder frame",
        config.head_type, config.vocab_size, config.vocabulary, config.upsample_rate,
    )  # fmt: skip
    return CTCVocabulary(config, processor.tokenizer, model.ctc_tensors)


def _new_config(model, processor, rows: Any, parts: TrainedPartsOptions) -> CTCHeadConfig:
    width = model.config.audio_adaptor_config.encoder_hidden_size
    heads = getattr(model.config.audio_encoder_config, "num_attention_heads", 4)
    heads = next(number for number in (heads, 4, 2, 1) if width % number == 0)
    options: dict[str, Any] = {
        "head_type": "sanm" if parts.ctc_head == "auto" else parts.ctc_head,
        "hidden_size": width,
        "num_attention_heads": heads,
    }
    if parts.ctc_vocabulary == "llm":
        size = len(processor.tokenizer)
        return CTCHeadConfig(vocabulary="llm", vocab_size=size + 1, blank_id=size, **options)
    if isinstance(rows, RowStream):
        raise ValueError(
            "--ctc_vocabulary characters needs all training rows, which are not available with --streaming; set llm"
        )
    rate = max(1, round(processor.encoder_frame_seconds / FRAME_SECONDS))
    return character_config(_answers(rows), upsample_rate=rate, **options)


def _answers(rows: Any) -> Iterator[str]:
    for messages in read_column(rows, "messages"):
        for turn in chat.parse_messages(json.loads(messages)).turns:
            yield chat.clean_answer(turn.answer or "")
