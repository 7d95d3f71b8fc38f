"""Vocabulary of the CTC head: converts texts to ids with their places in the text, and ids to texts."""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from .ctc_configuration import CTCHeadConfig

Spans = list[tuple[int, int]]


class CTCVocabulary:
    """Vocabulary of a CTC head.

    Args:
        config: `CTCHeadConfig` of the head.
        tokenizer: of the LLM; for the vocabulary `llm`.
        ctc_tensors: of the model, with FunASR's token file; for the vocabulary `tiktoken`.

    Raises:
        ValueError: if the token file is missing or damaged, or the LLM's tokenizer gives no offsets.
    """

    def __init__(self, config: Any, tokenizer: Any = None, ctc_tensors: Mapping[str, torch.Tensor] = {}):  # noqa: B006 (not changed)
        self.blank = config.blank_id
        self._size = config.vocab_size
        self._tokenizer: Tokenizer | None = None
        self._characters: Sequence[str] = config.characters or ()
        self._ids = {
            character: index for index, character in enumerate(self._characters) if index != self.blank and character
        }
        if config.vocabulary == "llm":
            if not tokenizer.is_fast:
                raise ValueError("a CTC head over the LLM's tokens requires a fast tokenizer, which gives offsets")
            self._tokenizer = tokenizer.backend_tokenizer
        elif config.vocabulary == "tiktoken":
            files = [tensor for name, tensor in ctc_tensors.items() if name.endswith(".tiktoken")]
            if len(files) != 1:
                raise ValueError("the CTC head's token file (*.tiktoken) is missing; copy it beside model.pt")
            self._tokenizer = _tiktoken(files[0].numpy().tobytes())

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text; characters outside the vocabulary are left out."""
        return self.encode_with_spans(text)[0]

    def encode_with_spans(self, text: str) -> tuple[list[int], Spans]:
        """Returns the ids of a text, and the start and end of each in the text."""
        if self._tokenizer is not None:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            pairs = [
                (id_, span)
                for id_, span in zip(encoding.ids, encoding.offsets, strict=True)
                if id_ < self._size and id_ != self.blank
            ]
            return [id_ for id_, _ in pairs], [span for _, span in pairs]
        ids: list[int] = []
        spans: Spans = []
        for index, character in enumerate(text):
            for part in normalized(character):
                id_ = self._ids.get(part)
                repeated_space = part == " " and (not ids or self._characters[ids[-1]] == " ")
                if id_ is not None and not repeated_space:
                    ids.append(id_)
                    spans.append((index, index + 1))
        if ids and self._characters[ids[-1]] == " ":
            del ids[-1], spans[-1]
        return ids, spans

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids without blanks and repetitions."""
        ids = [id_ for id_ in ids if id_ != self.blank]
        if self._tokenizer is not None:
            return self._tokenizer.decode(ids, skip_special_tokens=True).strip()
        return "".join(self._characters[id_] for id_ in ids).strip()

    def greedy(self, log_probabilities: torch.Tensor) -> list[int]:
        """Returns the ids of the most probable token in each frame, without blanks and repetitions.

        Args:
            log_probabilities: shape = (frames, `vocab_size`).
        """
        best = log_probabilities.argmax(-1).unique_consecutive().tolist()
        return [id_ for id_ in best if id_ != self.blank]


def normalized(text: str) -> str:
    """Returns a text as the vocabulary `characters` stores it: in lower case, with plain spaces."""
    return "".join(" " if character.isspace() else character for character in text.lower())


def character_config(texts: Iterable[str], **options: Any) -> CTCHeadConfig:
    """Returns the config of a head over the letters, digits and apostrophes of texts, and the space.

    Punctuation is left out, because it is not spoken.

    Args:
        texts: transcripts of the training rows.
        **options: other fields of `CTCHeadConfig`.

    Raises:
        ValueError: if the texts have no letters.
    """
    found = {character for text in texts for character in normalized(text) if is_spoken(character)}
    if not found:
        raise ValueError("the transcripts have no letters or digits, so there are no characters for the CTC head")
    characters = ["", " ", *sorted(found - {" "})]
    return CTCHeadConfig(vocabulary="characters", characters=characters, vocab_size=len(characters), **options)


def is_spoken(character: str) -> bool:
    """Whether a character is part of a word: letter, mark (not the variation of an emoji), digit or apostrophe."""
    is_mark = unicodedata.category(character) in ("Mn", "Mc") and not "\ufe00" <= character <= "\ufe0f"
    return character.isalnum() or character in "'\u2019" or is_mark


def _tiktoken(content: bytes) -> Tokenizer:
    """Builds a tokenizer from a token file: lines with a token in base64 and its rank."""
    ranks: dict[bytes, int] = {}
    try:
        for line in filter(bytes.strip, content.splitlines()):
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        if (
            not ranks
            or len({*ranks.values()}) < len(ranks)
            or not 0 <= min(ranks.values()) <= max(ranks.values()) < 2**31
        ):
            raise ValueError("the ranks must be different whole numbers from 0")
    except ValueError as error:
        raise ValueError(f"the CTC head's token file is damaged: {error}") from error
    letters = _byte_letters()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [part for part in parts if part[0] in ranks and part[1] in ranks]
        known.sort(key=lambda part: (ranks[part[0]], ranks[part[1]]))
        merges += [(names[left], names[right]) for left, right in known]
    vocab = {names[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_letters() -> dict[int, str]:
    """Returns the printable character for each byte, as in byte-level BPE."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + index) for index, byte in enumerate(moved)}
