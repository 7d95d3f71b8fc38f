"""Model cards: names of files, folders, data sets and base models are shown, without effect as markup."""

import re

import pytest

from hf_speechllm.hub.card import DataSummary, model_card
from hf_speechllm.hub.upload import hub_id

HOSTILE = [
    "x\n# Heading", "a|b|c", "`code`", "```\n<script>alert(1)</script>\n```", "[x](javascript:alert(1))", "a b",
    "<img src=x>", '"); evil("', "$(evil)", "\x1b[31m", "| --- |", "*b*", "~~s~~", "---\nlicense: mit\n---", "\\",
    "&lt;",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_markup_in_names_is_escaped(name):
    """The card has the same lines and cells as a card with harmless names; markup in names is code or text."""

    def card(name):
        data = [DataSummary(name, "training", 3, 10.0), DataSummary(name, "validation", 1, 1.0)]
        history = [{"step": 0, f"eval_{name}_loss": 1.0, f"eval_{name}_token_accuracy": 0.5}]
        return model_card(name, f"/models/{name}", {"llm": (10, 20)}, data, [("option", name)], log_history=history)

    lines, harmless = (card(text).split("\n") for text in (name, "name"))
    assert len(lines) == len(harmless)
    for line, other in zip(lines, harmless, strict=True):
        assert line.replace("\\|", "").count("|") == other.count("|") or other[:1] != "|"
        assert line[:1] == other[:1] or other[:1] not in ("#", "|", "`", "-", "")
    text = re.sub(r"(`+).*?\1", "", "\n".join(lines).replace("\\`", ""), flags=re.DOTALL)  # without code
    assert "<script" not in text and "<img" not in text and "](javascript" not in text.replace("\\]", "")


@pytest.mark.parametrize("name", ["x](javascript:alert(1))", "org/na me", "a/b/c", "org/<b>", "../x", "/abs", ""])
def test_invalid_hub_ids_are_not_links(name):
    assert hub_id(name) is None


@pytest.mark.parametrize("name", ["org/model-1.5_b", "model"])
def test_valid_hub_ids_are_recognised(name):
    assert hub_id(name) == name


def test_error_rates_have_their_name_and_unit():
    history = [{"step": step, "eval_loss": 1.0, "eval_cer": rate} for step, rate in ((0, 0.5), (9, 0.0123))]
    card = model_card("x", "/x", {}, [], [], log_history=history, rate_names={"": "WER"})
    assert "| `validation` | 1.0000 |  | WER 50.00 % | WER 1.23 % |" in card
