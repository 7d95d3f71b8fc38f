"""Layout of a dialogue: the text around system prompt, questions and answers, in ChatML or in an LLM's own template.

A part of `chat`: no other module uses a layout.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
THINK_BLOCK = "<think>\n\n</think>\n\n"
SYSTEM, QUESTION, ANSWER = "SYSTEM0", "QUESTION0", "ANSWER0"  # contents that mark their places in a rendered template
NEXT_QUESTION, NEXT_ANSWER = "QUESTION1", "ANSWER1"


@dataclass(frozen=True)
class ChatLayout:
    """The text of a dialogue, except for its contents.

    Args:
        start: text before the first question of a dialogue without system prompt.
        system_start, system_end: text before the system prompt, and between the system prompt and the first question.
        question_end: text between a question and its answer.
        answer_end: the token that ends an answer, which is supervised.
        next_start: text between `answer_end` and the next question.
        markers: special tokens of the layout, which contents must not contain.
    """

    start: str
    system_start: str
    system_end: str
    question_end: str
    answer_end: str
    next_start: str
    markers: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, values: Any) -> ChatLayout:
        """Builds a layout from the values in a processor's file.

        Raises:
            ValueError: if a value is missing, unknown or of a wrong type.
        """
        names = {item.name for item in fields(cls)}
        if not isinstance(values, dict) or values.keys() != names:
            raise ValueError(f"chat_layout must have the keys {', '.join(sorted(names))}")
        markers = values["markers"]
        texts = [*(value for name, value in values.items() if name != "markers"), *markers]
        if not isinstance(markers, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise ValueError("the values of chat_layout must be strings; markers must be a list of strings")
        if not values["answer_end"] or not all(markers):
            raise ValueError("chat_layout: answer_end and markers must not be empty")
        return cls(**{**values, "markers": tuple(markers)})

    def to_dict(self) -> dict[str, Any]:
        """Returns the values for a processor's file."""
        return {**asdict(self), "markers": list(self.markers)}


# No newline after the `<|im_end|>` of an answer, as in the layout on which the released Fun-ASR-Nano was trained.
CHATML = ChatLayout(
    start=f"{TURN_START}user\n",
    system_start=f"{TURN_START}system\n",
    system_end=f"{TURN_END}\n{TURN_START}user\n",
    question_end=f"{TURN_END}\n{TURN_START}assistant\n",
    answer_end=TURN_END,
    next_start=f"{TURN_START}user\n",
)


def layout_of(tokenizer: Any) -> ChatLayout | None:
    """Derives the layout from the chat template of an LLM.

    Thinking is turned off if the template can do so; the empty thinking block of the template then precedes each
    answer. Text that the template computes, such as the date, is that of this call.

    Args:
        tokenizer: tokenizer of the LLM.

    Returns:
        The layout; `None` if there is no template or no end token in the template, or if the layout is ChatML.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    first, second = _turn(QUESTION, ANSWER), _turn(NEXT_QUESTION, NEXT_ANSWER)
    dialogue = _render(tokenizer, [*first, *second])
    prompt = _render(tokenizer, first[:1], add_generation_prompt=True)
    start, question_end = prompt.split(QUESTION)
    between = dialogue.split(ANSWER)[1].split(NEXT_QUESTION)[0]
    special = sorted(map(str, tokenizer.get_added_vocab()), key=len, reverse=True)
    end = next((token for token in special if token.strip() and between.lstrip().startswith(token)), None)
    if end is None or len(tokenizer.encode(end, add_special_tokens=False)) != 1:
        return None
    layout = ChatLayout(start, start, "\n\n", question_end, end, between.split(end, 1)[1])
    try:
        with_system = _render(tokenizer, [{"role": "system", "content": SYSTEM}, *first])
    except Exception:  # jinja2's errors; such a template has no system role: the system prompt begins the question
        with_system = ""
    if SYSTEM in with_system:
        system_start, rest = with_system.split(SYSTEM)
        layout = replace(layout, system_start=system_start, system_end=rest.split(QUESTION)[0])
    if is_chatml(layout):
        return None
    text = "".join(asdict(layout)[item.name] for item in fields(layout) if item.name != "markers")
    return replace(layout, markers=tuple(token for token in special if token.strip() and token in text))


def is_chatml(layout: ChatLayout) -> bool:
    """Returns whether a layout is ChatML, apart from a default system prompt, a thinking block and final newlines."""
    question_end = layout.question_end.removesuffix(THINK_BLOCK)
    names = ("system_start", "system_end", "answer_end")
    same = all(getattr(layout, name) == getattr(CHATML, name) for name in names)
    return same and question_end == CHATML.question_end and layout.next_start.strip() == CHATML.next_start.strip()


def _turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False, **options)
