"""Checks of transcripts: each fault is found, and real transcripts of many languages have none."""

import pytest

from hf_speechllm.diagnosis.kinds import KINDS
from hf_speechllm.diagnosis.rows import DataRow
from hf_speechllm.diagnosis.scripts import fits_language, main_script, syllables
from hf_speechllm.diagnosis.text_checks import TEXT_CHECKS, check_text, show
from hf_speechllm.model.chat import transcription_prompt

PROMPT = transcription_prompt()


def row(text, prompt=PROMPT, language=None):
    return DataRow("id-1", "f", 1, "train", ["a.wav"], [text], prompt, True, language, "s-1", None, None, {})


def kinds(text, **options):
    return {kind for kind, _ in check_text(row(text, **options))}


@pytest.mark.parametrize(
    "kind, text",
    [
        ("no-words", "... !?"),
        ("no-words", "，。"),
        ("replacement-character", "caf\ufffd"),
        ("replacement-character", "caf\ue000"),
        ("mojibake", "cafÃ© au lait"),
        ("mojibake", "itâ€™s"),
        ("mojibake", "Ã\x81gua"),
        ("mojibake", "浣犲ソ"),
        ("mojibake", "РїСЂРёРІРµС‚"),
        ("mojibake", "锟斤拷好"),
        ("control-character", "a\x07b"),
        ("control-character", "a\x9bb"),
        ("line-break", "one\ttwo"),
        ("line-break", "one\ntwo"),
        ("line-break", "one\u2028two"),
        ("invisible-character", "one\u200btwo"),
        ("invisible-character", "\ufeffone"),
        ("invisible-character", "one\u202etwo"),
        ("invisible-character", "one\u00adtwo"),
        ("invisible-character", "你\u200d好"),
        ("not-normalized", "cafe\u0301"),
        ("full-width", "ＡＢＣ"),
        ("full-width", "１２３"),
        ("mixed-script", "pаy"),  # the second letter is Cyrillic
        ("mixed-script", "Ροme"),
        ("markup", "<b>bold</b>"),
        ("markup", "one<br>two"),
        ("markup", "a &amp; b"),
        ("markup", "a &#39;b"),
        ("markup", '<font color="red">x</font>'),
        ("markup", "<!-- x --> one"),
        ("markup", "**bold** words"),
        ("markup", "one\\ntwo"),
        ("markup", "one%20two"),
        ("odd-spaces", "one_two"),
        ("odd-spaces", "打 开 客 厅 的灯"),
        ("markup", "▁one ▁two"),
        ("markup", "tw@@ o"),
        ("markup", "tw ##o"),
        ("markup", "wʌn ˈtuː"),
        ("markup", "HH AH0 L OW1"),
        ("markup", '{"text": "one"}'),
        ("markup", "['one', 'two']"),
        ("markup", "b'one'"),
        ("markup", "00:00:01,000 --> 00:00:03,000 one"),
        ("markup", "[00:01] one"),
        ("markup", "00:00:01 one"),
        ("markup", "one &amp two"),
        ("markup", "# one"),
        ("markup", "*one two*"),
        ("markup", "wo3 men2 zou3"),
        ("markup", "广 guang3 州 zhou1 女 nv3"),
        ("annotation", "one () two"),
        ("annotation", "one [ ]"),
        ("annotation", "{} one"),
        ("annotation", "one <> two"),
        ("annotation", "one ((two))"),
        ("annotation", "<|0.00|>one<|2.40|>"),
        ("annotation", ">> one"),
        ("annotation", "- one"),
        ("annotation", "one (pause) two"),
        ("full-width", "\ufb01nd"),
        ("wrong-column", "id-1 one two"),
        ("wrong-column", "id-1,one two"),
        ("wrong-column", "one two (id-1)"),
        ("wrong-column", "d41d8cd98f00b204e9800998ecf8427e"),
        ("wrong-column", "3f2504e0-4f89-11d3-9a0c-0305e82c3301"),
        ("wrong-column", "#NAME?"),
        ("annotation", "A: one two"),
        ("annotation", "Speaker_01: one two"),
        ("repetition", "open the door and come in open the door and come in"),
        ("repetition", "打开客厅的灯光和空调打开客厅的灯光和空调"),
        ("wrong-column", "clips/utt_001.wav"),
        ("wrong-column", "/data/utt_001"),
        ("wrong-column", "id-1"),
        ("wrong-column", "s-1"),
        ("wrong-column", "None"),
        ("annotation", "one <unk> two"),
        ("annotation", "<|nospeech|>"),
        ("annotation", "[laughter] yes"),
        ("annotation", "[UNK] yes"),
        ("annotation", "(laughs) yes"),
        ("annotation", "yes <SPOKEN_NOISE>"),
        ("annotation", "{noise} yes"),
        ("annotation", "♪ la la"),
        ("url", "see https://example.org/a"),
        ("url", "see www.example.org"),
        ("url", "mail me@example.org"),
        ("emoji", "good \U0001f600"),
        ("repetition", "the the the the end"),
        ("repetition", "thank you so much thank you so much thank you so much thank you so much"),
        ("repetition", "谢谢观看谢谢观看谢谢观看谢谢观看"),
        ("long-word", "thisisasentencewithoutanyspacesbetweenitswords"),
        ("odd-spaces", "one  two"),
        ("odd-spaces", "one\u00a0two"),
        ("odd-spaces", "one\u3000two"),
        ("odd-quotes", '""one""'),
        ("odd-quotes", '"one two'),
    ],
)
def test_fault_is_found(kind, text):
    assert kind in kinds(text)


@pytest.mark.parametrize(
    "text",
    [
        "I said: \"it's 5 o'clock, isn't it?\"",
        "one one one one one",
        "七七七七七七",
        "no no no no",
        "Çok güzel, teşekkürler – naïve façade",
        "这是一个iPhone的广告，价格是5,000元。",
        "想听歌曲Let It Go",
        "東京タワーはどこですか",
        "한국어 문장입니다",
        "می\u200cخواهم بروم",  # Persian needs the zero-width non-joiner
        "क्\u200dष यह हिन्दी है",
        "नाना नानी ने ना",
        "Это русский текст и слово USB",
        "Donaudampfschifffahrtsgesellschaft",
        "5 < 6 and 7 > 3",
        "AT&T and R&D",
        "他说（笑着）你好",
        "œuvre Ελληνικά",
        "a",  # the name of the recording
        "I don't know, I don't know",
        "at 10:30, and/or 50% of it",
        "他说:好的",
        "NULL BIS NEUN",
        "id-10 is said",
        "from mp3 to mp4, and e4 e5 d4",
        "minus 5 degrees - or 6",
        "1234567890123456 or more",
        "it is here (again)",
        "none",
    ],
)
def test_real_text_has_no_findings(text):
    assert kinds(text) == set()


def test_every_check_has_a_kind():
    assert set(TEXT_CHECKS) <= set(KINDS)


def test_digits_count_only_without_normalisation():
    assert "digits" in kinds("call 911", prompt=transcription_prompt(itn=False))
    assert "digits" not in kinds("call 911")


def test_language_of_prompt_and_row():
    assert "wrong-language" in kinds("打开客厅的灯", prompt=transcription_prompt("en"))
    assert "wrong-language" in kinds("打开客厅的灯", language="en")
    assert "wrong-language" in kinds("turn on the light", prompt=transcription_prompt("zh"), language="en")
    assert "wrong-language" not in kinds("打开客厅的灯", prompt=transcription_prompt("zh"))
    assert "wrong-language" not in kinds("Let It Go", language="xx")


def test_scripts_and_syllables():
    assert main_script("東京はどこ") == "HIRAGANA"
    assert main_script("打开 Let It Go") == "LATIN"
    assert main_script("12") is None
    assert fits_language("こんにちは", "ja") and not fits_language("привет", "en")
    assert syllables("七八") == 2
    assert syllables("S A M S U N G") == syllables("SMSNG") + 2 == 7
    assert 4 < syllables("Guten Morgen, liebe Freunde") < 11
    assert show("a\u200b\n") == "a\\u200b\\u000a"
