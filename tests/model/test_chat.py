"""The dialogue format: supervised tokens, prompts, number of audio tokens, and invalid dialogues."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_speechllm import FbankFeatureExtractor, SpeechLLMProcessor
from hf_speechllm.formats.composition import train_tokenizer
from hf_speechllm.model import chat
from hf_speechllm.model.audio_lengths import num_audio_tokens
from hf_speechllm.model.chat import (
    AUDIO_TOKEN,
    IGNORE_INDEX,
    TURN_END,
    TURN_START,
    ChatError,
    parse_messages,
    tokenize,
)

pytestmark = pytest.mark.core

TOKENIZER = train_tokenizer(["hello world", "几点了？", "语音转写：", "one two three"], vocab_size=320)
AUDIO_ID = TOKENIZER.convert_tokens_to_ids(AUDIO_TOKEN)
END_ID = TOKENIZER.convert_tokens_to_ids(TURN_END)
SPEECH = "<|startofspeech|>!a.wav<|endofspeech|>"


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def decoded(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=False).replace(AUDIO_TOKEN, "*")


def example(messages, counts, **options):
    return tokenize(parse_messages(messages), TOKENIZER, counts, AUDIO_ID, **options)


def supervised_spans(labels):
    """Runs of supervised tokens."""
    spans, previous = [], IGNORE_INDEX
    for label in labels:
        if label != IGNORE_INDEX:
            if previous == IGNORE_INDEX:
                spans.append([])
            spans[-1].append(label)
        previous = label
    return spans


def test_layout_is_that_of_the_original():
    messages = [{"role": "system", "content": "You are a helpful assistant."}, user(f"语音转写：{SPEECH}")]
    result = example([*messages, assistant("几点了？")], [3])
    prompt = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n语音转写：***<|im_end|>\n<|im_start|>assistant\n"
    )
    assert decoded(result.input_ids) == prompt + "几点了？<|im_end|>"
    assert decoded([label for label in result.labels if label != IGNORE_INDEX]) == "几点了？<|im_end|>"
    asked = example(messages, [3])
    assert decoded(asked.input_ids) == prompt
    assert result.input_ids[: len(asked.input_ids)] == asked.input_ids  # training and decoding use the same prompt
    assert set(asked.labels) == {IGNORE_INDEX}


def test_tokens_that_a_tokenizer_puts_around_texts_stay_away():
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(TOKENIZER)
    start = tokenizer.convert_tokens_to_ids(TURN_START)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{TURN_START} $A", pair=f"{TURN_START} $A $B", special_tokens=[(TURN_START, start)]
    )
    assert tokenizer.encode("one")[0] == start
    dialogue = parse_messages([user(f"語{SPEECH}"), assistant("one")])
    assert tokenize(dialogue, tokenizer, [2], AUDIO_ID) == tokenize(dialogue, TOKENIZER, [2], AUDIO_ID)


def test_turns_follow_each_other_without_a_newline():
    messages = [user(f"语音转写：{SPEECH}"), assistant("one"), user(f"Again: {SPEECH}!"), assistant("two three")]
    result = example(messages, [2, 4])
    assert decoded(result.input_ids) == (
        f"<|im_start|>system\n{chat.DEFAULT_SYSTEM}<|im_end|>\n"
        "<|im_start|>user\n语音转写：**<|im_end|>\n<|im_start|>assistant\none<|im_end|>"
        "<|im_start|>user\nAgain: ****!<|im_end|>\n<|im_start|>assistant\ntwo three<|im_end|>"
    )
    assert [decoded(ids) for ids in supervised_spans(result.labels)] == ["one<|im_end|>", "two three<|im_end|>"]


def test_thinking_block_is_not_supervised():
    result = example([user(SPEECH), assistant("one")], [1], think_block=True)
    assert decoded(result.input_ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\none<|im_end|>")
    assert [decoded(ids) for ids in supervised_spans(result.labels)] == ["one<|im_end|>"]


def test_beginning_of_an_answer_that_is_given_is_not_supervised():
    messages = [user(SPEECH), {**assistant("two"), "prev_content": "one "}, user(SPEECH), assistant("three")]
    result = example(messages, [1, 1])
    assert "assistant\none two<|im_end|>" in decoded(result.input_ids)
    assert [decoded(ids) for ids in supervised_spans(result.labels)] == ["two<|im_end|>", "three<|im_end|>"]
    ids = [TOKENIZER.encode(text, add_special_tokens=False) for text in ("one ", "two")]  # each by itself
    assert str(ids[0] + ids[1])[1:-1] in str(result.input_ids)
    dialogue = parse_messages(messages)
    assert chat.render(dialogue, "*") == decoded(result.input_ids)
    asked = chat.Dialogue(None, (chat.Turn(dialogue.turns[0].pieces, None, "one "),))
    assert chat.render(asked, "*").endswith("assistant\none ")
    with pytest.raises(ChatError, match='the "prev_content" of the assistant message contains <|im_end|>'):
        parse_messages([user(SPEECH), {**assistant("two"), "prev_content": "<|im_end|>"}])
    with pytest.raises(ChatError, match='the "prev_content" of the assistant message must be a string'):
        parse_messages([user(SPEECH), {**assistant("two"), "prev_content": ["one"]}])


def test_context_of_the_first_message_stands_before_its_prompt_with_the_hotwords():
    messages = [{**user(SPEECH), "context": "known"}, assistant("one"), {**user(SPEECH), "context": "x"}]
    dialogue = parse_messages(messages, ["word"])
    assert dialogue.turns[0].pieces[0] == chat.hotword_context(["word"], "known")
    assert len(dialogue.turns[1].pieces) == 1


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<|"), max_size=12)
TURNS = st.lists(
    st.tuples(TEXT, st.one_of(st.none(), st.integers(1, 9)), TEXT, TEXT.filter(str.strip)), min_size=1, max_size=4
)


@settings(max_examples=150, deadline=None)
@given(system=TEXT, turns=TURNS, open_end=st.booleans())
def test_answers_and_their_ends_are_supervised_and_nothing_else(system, turns, open_end):
    messages = [{"role": "system", "content": system}]
    counts = []
    for before, count, after, answer in turns:
        speech = "" if count is None else "<|startofspeech|>!dir/a b.wav<|endofspeech|>"
        messages += [user(before + speech + after), assistant(answer)]
        counts += [] if count is None else [count]
    answers = [answer for _, _, _, answer in turns]
    if open_end:
        messages.pop()
        answers.pop()
    result = example(messages, counts)
    assert len(result.labels) == len(result.input_ids)
    assert all(label in (IGNORE_INDEX, token) for label, token in zip(result.labels, result.input_ids, strict=True))
    expected = [TOKENIZER.encode(answer, add_special_tokens=False) + [END_ID] for answer in answers]
    assert supervised_spans(result.labels) == expected
    assert result.input_ids.count(AUDIO_ID) == sum(counts)
    assert result.input_ids.count(END_ID) == 1 + len(turns) + len(answers)


PROCESSOR = SpeechLLMProcessor(FbankFeatureExtractor(), TOKENIZER, use_low_frame_rate=True)


@settings(max_examples=60, deadline=None)
@given(dialogues=st.lists(TURNS, min_size=1, max_size=4), side=st.sampled_from(["left", "right"]))
def test_padding_on_either_side_moves_the_labels_with_their_tokens(dialogues, side):
    parsed, frames = [], []
    for turns in dialogues:
        messages = []
        for before, count, after, answer in turns:
            speech = "" if count is None else SPEECH
            messages += [user(before + speech + after), assistant(answer)]
        parsed.append(parse_messages(messages))
        frames.append([8 * count for _, count, _, _ in turns if count is not None])
    examples = [PROCESSOR.tokenize(*pair) for pair in zip(parsed, frames, strict=True)]
    columns = {"input_ids": [item.input_ids for item in examples], "labels": [item.labels for item in examples]}
    batch = PROCESSOR.pad_tokens(columns, side)
    for row, turns in enumerate(dialogues):
        mask, ids, labels = (batch[name][row].tolist() for name in ("attention_mask", "input_ids", "labels"))
        length = len(examples[row].input_ids)
        assert mask == ([0] * (len(mask) - length) + [1] * length)[:: 1 if side == "left" else -1]
        kept = slice(len(mask) - length, None) if side == "left" else slice(length)
        assert (ids[kept], labels[kept]) == (examples[row].input_ids, examples[row].labels)
        assert all(label == IGNORE_INDEX for label, real in zip(labels, mask, strict=True) if not real)
        answers = [TOKENIZER.encode(answer, add_special_tokens=False) + [END_ID] for _, _, _, answer in turns]
        assert supervised_spans(labels) == answers


def test_thinking_block_and_system_prompt_are_options_of_the_processor(tmp_path):
    dialogue = parse_messages([user(SPEECH), assistant("one")])
    plain = decoded(PROCESSOR.tokenize(dialogue, [8]).input_ids)
    options = {"think_block": True, "system_prompt": False}
    SpeechLLMProcessor(FbankFeatureExtractor(), TOKENIZER, **options).save_pretrained(tmp_path)
    loaded = SpeechLLMProcessor.from_pretrained(tmp_path)
    system, rest = plain.split("<|im_start|>user", 1)
    expected = ("<|im_start|>user" + rest).replace("assistant\n", "assistant\n<think>\n\n</think>\n\n")
    assert system and decoded(loaded.tokenize(dialogue, [1]).input_ids) == expected
    waveform = np.zeros(1600, np.float32)
    asked = decoded(loaded.apply_transcription_request(waveform, prompt="P:")["input_ids"][0].tolist())
    assert asked.startswith("<|im_start|>user\nP:") and asked.endswith("assistant\n<think>\n\n</think>\n\n")


def test_messages_are_left_as_they_are():
    messages = [{"role": "system", "content": "x"}, user(SPEECH), assistant("one")]
    copied = copy.deepcopy(messages)
    parse_messages(messages)
    assert messages == copied


def test_ids_of_an_answer_do_not_depend_on_the_preceding_text():
    answers = [
        supervised_spans(example([user(text + SPEECH), assistant("hello world")], [n]).labels)[0]
        for text, n in (("", 1), ("语音转写：", 5), ("Speech transcription: ", 2))
    ]
    assert answers[0] == answers[1] == answers[2]


def test_number_of_lengths_must_equal_number_of_recordings():
    with pytest.raises(ChatError, match="1 recordings, but 2 lengths"):
        example([user(SPEECH), assistant("one")], [1, 2])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "语音转写："),
        ({"language": "en"}, "语音转写成英文："),
        ({"language": "英文"}, "语音转写成英文："),
        ({"language": "ZH"}, "语音转写成中文："),
        ({"language": "ja", "itn": False}, "语音转写成日文，不进行文本规整："),
        ({"itn": False}, "语音转写，不进行文本规整："),
        ({"language": "德文"}, "语音转写成德文："),  # a language that the released models were not trained on
        ({"prompt": "Speech transcription:"}, "Speech transcription:"),
        ({"prompt": "Transcribe speech into Chinese:"}, "Transcribe speech into Chinese:"),
    ],
)
def test_prompt_contains_language_and_normalisation(options, expected):
    assert chat.transcription_prompt(**options) == expected


HEADER = (
    "请结合上下文信息，更加准确地完成语音转写任务。如果没有相关信息，我们会留空。\n\n\n"
    "**上下文信息：**\n\n\n热词列表：[{}]\n"
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hotwords": 5}, "hotwords is 5; it must be a list of strings"),
        ({"hotwords": ["a", 1]}, r"hotwords is \['a', 1\]; it must be a list of strings"),
        ({"context": [1]}, r"context is \[1\]; it must be a string"),
        ({"prompt": 1}, "prompt is 1; it must be a string"),
        ({"language": ["en"]}, r"language is \['en'\]; it must be a string"),
    ],
)
def test_values_of_the_wrong_type_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        chat.transcription_prompt(**options)


def test_hotwords_are_written_in_a_header():
    hotwords = ["开放时间", "Qwen"]
    assert chat.transcription_prompt(hotwords="开放时间,Qwen") == chat.transcription_prompt(hotwords=hotwords)
    assert chat.transcription_prompt(hotwords=hotwords) == HEADER.format("开放时间, Qwen") + "语音转写："
    assert chat.transcription_prompt(prompt="P:", hotwords=["a"]) == HEADER.format("a") + "P:"
    assert chat.hotword_context([]) == ""


def test_context_precedes_the_hotwords():
    header = HEADER.format("ICE").replace("热词列表", "About trains.\n热词列表")
    assert chat.transcription_prompt(hotwords=["ICE"], context="About trains.") == header + "语音转写："
    alone = header.partition("热词列表")[0]
    assert chat.transcription_prompt("en", context="About trains.") == alone + "语音转写成英文："


def test_hotwords_of_a_dialogue_precede_only_the_first_prompt():
    messages = [user(f"语音转写：{SPEECH}"), assistant("one"), user(f"语音转写：{SPEECH}"), assistant("two")]
    result = tokenize(parse_messages(messages, ["Qwen"]), TOKENIZER, [1, 1], AUDIO_ID)
    assert decoded(result.input_ids).count("热词列表") == 1
    assert f"user\n{HEADER.format('Qwen')}语音转写：*<|im_end|>" in decoded(result.input_ids)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, []),
        ("", []),
        ("a,b c， 开放 ,,", ["a", "b c", "开放"]),
        (["a", " ", " b "], ["a", "b"]),
    ],
)
def test_hotwords_are_a_list_or_a_string_with_commas(given, expected):
    assert chat.parse_hotwords(given) == expected


@pytest.mark.parametrize(
    "token", [chat.TURN_START, chat.TURN_END, chat.AUDIO_TOKEN, chat.SPEECH_START, chat.SPEECH_END]
)
def test_hotwords_must_not_contain_special_tokens(token):
    with pytest.raises(chat.ChatError, match="a hotword contains"):
        chat.parse_hotwords(["fine", f"not {token} fine"])


@pytest.mark.parametrize("options", [{"language": "en"}, {"itn": False}])
def test_prompt_excludes_language_and_normalisation(options):
    with pytest.raises(ValueError, match="one or the other"):
        chat.transcription_prompt(prompt="P:", **options)


def test_languages_have_codes_english_and_chinese_names():
    prompts = {chat.transcription_prompt(language=name) for name in ("hr", "Croatian", "croatian", "克罗地亚语")}
    assert len(prompts) == 1 and "克罗地亚语" in prompts.pop()
    with pytest.raises(ValueError, match="unknown language 'German'"):  # not one of the model
        chat.transcription_prompt(language="German")


def test_unknown_language_error_lists_the_known_languages():
    with pytest.raises(ValueError, match=r"unknown language 'klingon'.*en \(英文\)"):
        chat.transcription_prompt(language="klingon")


def test_recording_may_be_a_path_in_the_text_or_a_separate_part():
    as_text = parse_messages([user(f"语音转写：{SPEECH}."), assistant("one")])
    for key in ("audio", "path", "url"):
        part = {"type": "audio", key: "a.wav"}
        texts = [{"type": "text", "text": "语音转写："}, {"type": "text", "text": "."}]
        as_parts = parse_messages([user([texts[0], part, texts[1]]), assistant([{"type": "text", "text": "one"}])])
        assert as_parts == as_text
    assert as_text.recordings == ["a.wav"]
    mixed = parse_messages([user([{"type": "text", "text": f"语音转写：{SPEECH}."}]), assistant("one")])
    assert mixed == as_text


def test_transcription_messages_contain_a_path_or_a_waveform():
    waveform = object()
    for recording in ("a.wav", waveform):
        dialogue = parse_messages(chat.transcription_messages(recording, "语音转写：", "one"))
        assert dialogue.system == chat.DEFAULT_SYSTEM
        assert dialogue.recordings == [recording]
        assert dialogue.turns[0].pieces[0] == "语音转写："
        assert dialogue.turns[0].answer == "one"
    assert parse_messages(chat.transcription_messages("a.wav", "P:")).turns[0].answer is None


GOOD = [user(SPEECH), assistant("one")]
START, END = "<|startofspeech|>", "<|endofspeech|>"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("text", "must be a list"),
        (["text"], "must be a list"),
        ([], 'no "user" message'),
        ([{"role": "system", "content": "x"}], 'no "user" message'),
        ([assistant("one")], "has role 'assistant'; expected \"user\""),
        ([*GOOD, assistant("two")], 'message 3 .* expected "user"'),
        ([user(SPEECH), user(SPEECH)], 'message 2 .* expected "assistant"'),
        ([{"content": SPEECH}], "has role None"),
        ([{"role": "system"}, *GOOD], "system message must be a string"),
        ([{"role": "system", "content": None}, *GOOD], "system message must be a string"),
        ([{"role": "system", "content": [{"type": "text", "text": None}]}, *GOOD], "parts of the system message"),
        ([{"role": "system", "content": [{"type": "text"}]}, *GOOD], "parts of the system message"),
        ([{"role": "system", "content": [3]}, *GOOD], "parts of the system message"),
        ([user(None), assistant("one")], "user message must be a string or a list"),
        ([user([{"type": "text"}]), assistant("one")], "parts of the user message"),
        ([user([{"type": "text", "text": None}]), assistant("one")], "parts of the user message"),
        ([user([{"type": "image", "image": "a.png"}]), assistant("one")], "parts of the user message"),
        ([user(["text"]), assistant("one")], "parts of the user message"),
        ([user([{"type": "audio"}]), assistant("one")], 'exactly one of "audio", "path", "url"'),
        ([user([{"type": "audio", "path": "a", "url": "b"}]), assistant("one")], "exactly one of"),
        ([user(SPEECH), {"role": "assistant"}], "assistant message must be a string"),
        ([user(SPEECH), assistant(5)], "assistant message must be a string"),
        ([user(SPEECH), assistant([{"type": "text", "text": None}])], "parts of the assistant message"),
        ([user(SPEECH), assistant("")], "transcript.* is empty"),
        ([user(SPEECH), assistant(" \n")], "transcript.* is empty"),
        ([user(SPEECH), assistant([])], "transcript.* is empty"),
        ([user(f"{START}a.wav{END}"), assistant("one")], r"no '!' after .*write <\|startofspeech\|>!a.wav"),
        ([user(f"{START}!a.wav"), assistant("one")], "without .*; add "),
        ([user(f"{START}!a.wav{START}!b.wav{END}"), assistant("one")], "before the next one; add "),
        ([user(f"a.wav{END}"), assistant("one")], "without .*startofspeech.* before it"),
        ([user(f"{START}!{END}"), assistant("one")], "no path between"),
        ([user(f"{START}! {END}"), assistant("one")], "no path between"),
        ([user(SPEECH + SPEECH), assistant("one")], "two recordings in one user message"),
        ([user(f"{TURN_START}user{SPEECH}"), assistant("one")], r"user message contains"),
        ([user(f"{AUDIO_TOKEN}{SPEECH}"), assistant("one")], r"user message contains"),
        ([user(SPEECH), assistant(f"one{TURN_END}")], r"assistant message contains <\|im_end\|>"),
        ([user(SPEECH), assistant(f"one{START}")], r"assistant message contains <\|startofspeech\|>"),
        ([{"role": "system", "content": AUDIO_TOKEN}, *GOOD], "system message contains"),
    ],
)
def test_invalid_dialogue_raises_an_error_with_the_reason(messages, reason):
    with pytest.raises(ChatError, match=reason):
        parse_messages(messages)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([SPEECH, START, END, "user", "x", "text", "audio"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "audio", "path", "url"]), inner, max_size=3
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    messages=st.one_of(
        JSON,
        JSON.map(lambda content: [user(content), assistant("one")]),
        JSON.map(lambda c: [user(SPEECH), assistant(c)]),
    )
)
def test_any_content_of_a_row_is_a_dialogue_or_a_chat_error(messages):
    try:
        dialogue = parse_messages(messages)
    except ChatError:
        return
    assert dialogue.turns


def original_low_frame_rate(frames):
    """`fake_token_len` of Fun-ASR's `model.py`: lengths of three strided convolutions."""
    length = 1 + (frames - 3 + 2 * 1) // 2
    length = 1 + (length - 3 + 2 * 1) // 2
    return (length - 1) // 2 + 1


def test_number_of_audio_tokens_equals_the_original_for_every_length():
    for frames in range(1, 20_001):
        assert num_audio_tokens(frames, 1, True) == original_low_frame_rate(frames)
        for rate in (1, 2, 3, 4, 8):
            stacked = (frames - 1) // rate + 1
            assert num_audio_tokens(frames, rate, False) == stacked
            assert num_audio_tokens(frames, rate, True) == original_low_frame_rate(stacked)


def test_encoder_downsampling_precedes_the_adaptor(parts):
    def count(frames, *rates):
        processor = copy.copy(parts[1])
        processor.encoder_downsample_rate, processor.downsample_rate, processor.use_low_frame_rate = rates
        return processor.num_audio_tokens(frames)

    assert count(3000, 2, 4, False) == 375
    assert count(7, 2, 2, False) == 2
    assert count(7, 2, 1, True) == 1
    assert count(7, 2, 1, False) == 4  # a last odd frame counts
    assert count(9, 2, 2, False) == 3


@pytest.mark.parametrize(
    ("answer", "text"),
    [("/sil", ""), ("好的/sil/sil 再见 ", "好的 再见"), ("one\n/sil two", "one two"), ("and/silver", "and/silver")],
)
def test_silence_marks_are_removed_from_an_answer(answer, text):
    assert chat.clean_answer(answer) == text


@pytest.mark.parametrize(
    "text",
    ["<|endoftext|>", "hello <|endoftext|> world", "<think>one</think>", "<<think>>", "hello <think", "<|one|>"],
)
def test_a_transcript_never_becomes_a_special_token(text):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_tokens(["<|endoftext|>"], special_tokens=True)
    tokenizer.add_tokens(["<think>", "</think>"])
    dialogue = parse_messages([user(SPEECH), assistant(text)])
    result = tokenize(dialogue, tokenizer, [3], AUDIO_ID)
    labels = [label for label in result.labels if label != IGNORE_INDEX]
    assert [label for label in labels if label in tokenizer.get_added_vocab().values()] == [END_ID]
    assert tokenizer.decode(labels[:-1]) == text
