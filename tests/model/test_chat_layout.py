"""Layouts from chat templates: prompts, supervised tokens and the end of generation follow the LLM's template."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.fast.attention import enable_padding_free
from hf_speechllm.formats.composition import compose
from hf_speechllm.model import chat
from hf_speechllm.model.chat_layout import CHATML, layout_of
from hf_speechllm.model.loss import label_positions
from hf_speechllm.model.packing import non_padding_positions

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8,
    "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
LOOP = "{%- for message in messages -%}"
PROMPT = "{%- if add_generation_prompt -%}"
# Shortened from the published templates: roles, whitespace, dates and thinking are kept.
TEMPLATES = {
    "qwen3": LOOP + "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}{%- endfor -%}"
    + PROMPT + "{{- '<|im_start|>assistant\\n' -}}{%- if enable_thinking is false -%}"
    "{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}{%- endif -%}",
    "llama": "{{- bos_token -}}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + strftime_now('%d %b %Y') + '\\n\\n' -}}"
    "{%- if messages[0].role == 'system' -%}{{- messages[0].content -}}{%- endif -%}{{- '<|eot_id|>' -}}"
    + LOOP + "{%- if message.role != 'system' -%}"
    "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' -}}"
    "{%- endif -%}{%- endfor -%}" + PROMPT
    + "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}",
    "gemma3_text": "{{- bos_token -}}{%- set first = '' -%}{%- if messages[0].role == 'system' -%}"
    "{%- set first = messages[0].content + '\\n\\n' -%}{%- set messages = messages[1:] -%}{%- endif -%}"
    + LOOP + "{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}"
    "{%- if loop.first -%}{{- first -}}{%- endif -%}{{- message.content | trim + '<end_of_turn>\\n' -}}{%- endfor -%}"
    + PROMPT + "{{- '<start_of_turn>model\\n' -}}{%- endif -%}",
    "smollm3": "{{- '<|im_start|>system\\n## Metadata\\n\\nToday Date: ' + strftime_now('%d %B %Y') + '\\n' -}}"
    "{{- 'Reasoning Mode: ' + ('/think' if enable_thinking else '/no_think') + '\\n\\n## Custom Instructions' -}}"
    "{%- if messages[0].role == 'system' -%}{{- '\\n\\n' + messages[0].content -}}{%- endif -%}{{- '\\n\\n' -}}"
    + LOOP + "{%- if message.role == 'user' -%}"
    "{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' -}}{%- elif message.role == 'assistant' -%}"
    "{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' + message.content + '<|im_end|>\\n' -}}{%- endif -%}"
    "{%- endfor -%}" + PROMPT + "{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' -}}{%- endif -%}",
    "phi": LOOP + "{{- '<|' + message.role + '|>' + message.content + '<|end|>' -}}{%- endfor -%}"
    + PROMPT + "{{- '<|assistant|>' -}}{%- else -%}{{- eos_token -}}{%- endif -%}",
}  # fmt: skip
# Special tokens, of which the first is `bos_token` and the second is `eos_token`; the token that ends an answer.
TOKENS = {
    "qwen3": (["<|endoftext|>", "<|im_end|>", "<|im_start|>"], "<|im_end|>"),
    "llama": (["<bos>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"], "<|eot_id|>"),
    "gemma3_text": (["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
    "smollm3": (["<|endoftext|>", "<|im_end|>", "<|im_start|>"], "<|im_end|>"),
    "phi": (["<|endoftext|>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], "<|end|>"),
}


def make_tokenizer(name, template=None):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = TOKENS[name][0]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["hello world"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[0], eos_token=special[1], pad_token=special[0]
    )
    tokenizer.chat_template = TEMPLATES[name] if template is None else template
    return tokenizer


@pytest.fixture(scope="module", params=TEMPLATES)
def composed(request, tmp_path_factory, tiny_config):
    """Model and processor from a pretrained LLM with its chat template."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    tokenizer = make_tokenizer(name)
    config = AutoConfig.for_model(name, vocab_size=len(tokenizer), **SIZES)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sizes = {key: value for key, value in tiny_config().items() if key != "llm_config"}
    model, processor = compose(sizes, str(folder), llm=str(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return name, model.eval(), processor


def dialogue(*answers, system="Be brief."):
    messages = [{"role": "system", "content": system}]
    for number, answer in enumerate(answers):
        speech = [{"type": "text", "text": f"Write {number}: "}, {"type": "audio", "audio": number}]
        messages += [{"role": "user", "content": speech}, {"role": "assistant", "content": answer}]
    return chat.parse_messages(messages if answers[-1] is not None else messages[:-1])


def test_the_text_of_a_dialogue_is_that_of_the_template(composed):
    name, _, processor = composed
    tokenizer = make_tokenizer(name)
    audio = processor.audio_token
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"Write 0: {audio}"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": f"Write 1: {audio}"},
    ]

    def render(messages, **options):
        return tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False, **options)

    first = chat.render(dialogue(None), audio, layout=processor.layout)
    later = chat.render(dialogue("one", None), audio, layout=processor.layout)
    expected = [render(messages[:2], add_generation_prompt=True), render(messages, add_generation_prompt=True)]
    if name == "qwen3":  # Fun-ASR's ChatML: no thinking block, no newline after an answer
        assert processor.chat_layout is None
        expected = [
            text.replace(chat.THINK_BLOCK, "").replace("one<|im_end|>\n", "one<|im_end|>") for text in expected
        ]
    assert [first, later] == expected


def test_answers_and_their_end_tokens_are_supervised(composed):
    name, model, processor = composed
    tokenizer, end = processor.tokenizer, TOKENS[name][1]
    spelled = "one" if end == chat.TURN_END else f"one {end}"  # `parse_messages` refuses those of ChatML
    example = processor.tokenize(dialogue(spelled, "two"), [40, 20])
    supervised = [token for token, label in zip(example.input_ids, example.labels, strict=True) if label != -100]
    assert tokenizer.decode(supervised) == f"{spelled}{end}two{end}"
    end_id = tokenizer.convert_tokens_to_ids(end)
    assert supervised.count(end_id) == 2  # the transcript's spelling stays text
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == end_id
    assert model.generation_config.bos_token_id is None
    prompt = processor.tokenize(dialogue(None), [40]).input_ids
    assert example.input_ids[: len(prompt)] == prompt  # training and decoding agree
    assert end_id in processor.tokenizer.all_special_ids


def test_special_tokens_of_the_layout_are_refused_in_prompts(composed):
    name, _, processor = composed
    for marker in processor.layout.markers:
        for turns in (
            chat.Dialogue(f"Be {marker}", dialogue("one").turns),
            chat.Dialogue(None, (chat.Turn((f"a{marker}",), "one"),)),
        ):
            with pytest.raises(chat.ChatError, match="remove this special token"):
                chat.render(turns, processor.audio_token, layout=processor.layout)
    assert bool(processor.layout.markers) == (name != "qwen3")


def test_a_padded_batch_equals_its_examples_and_saved_models_compute_the_same(composed, waveforms, tmp_path):
    _, model, processor = composed
    dialogues = [dialogue("one", "two two"), dialogue("three")]
    batch = processor.batch(dialogues, waveforms[:3], True)
    rows = [(dialogues[:1], waveforms[:2]), (dialogues[1:], waveforms[2:3])]
    single = [processor.batch(*row, True) for row in rows]
    gradients = []
    for inputs in ([batch], single):
        model.zero_grad()
        loss = sum(model(**item, num_items_in_batch=1).loss for item in inputs)
        loss.backward()
        gradients.append([loss.detach(), *(item.grad for item in model.parameters())])
    for together, alone in zip(*gradients, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    model.zero_grad()

    for part in (model, processor):
        part.save_pretrained(tmp_path)
    loaded = SpeechLLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    again = SpeechLLMProcessor.from_pretrained(tmp_path)
    assert again.layout == processor.layout
    with torch.no_grad():
        expected = model(**batch, return_logits=True).logits
        assert torch.equal(loaded(**again.batch(dialogues, waveforms[:3], True), return_logits=True).logits, expected)


def test_a_padding_free_batch_equals_a_padded_batch(composed, waveforms):
    name, model, processor = composed
    model = copy.deepcopy(model)
    batch = processor.batch([dialogue("one", "two two"), dialogue("three")], waveforms[:3], True)
    if name == "gemma3_text":  # some layers attend to a window
        with pytest.raises(ValueError, match="requires an LLM of type qwen2 or qwen3 or llama or phi or smollm3"):
            enable_padding_free(model)
        return
    positions = {
        "labels": label_positions(batch["labels"]),
        "tokens": non_padding_positions(batch["attention_mask"]),
        "frames": non_padding_positions(batch["input_features_mask"]),
    }
    results, shapes = [], []
    for packed in (False, True):
        if packed:
            enable_padding_free(model)
            layer = model.llm.get_decoder().layers[0]
            layer.register_forward_hook(lambda layer, inputs, output: shapes.append(output.shape[:2]))
        model.zero_grad()
        loss = model(**batch, positions=positions if packed else {}).loss
        loss.backward()
        results.append([loss.detach(), *(item.grad for item in model.parameters())])
    assert shapes == [(1, int(batch["attention_mask"].sum()))]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_decoding_in_a_batch_equals_one_by_one(composed, waveforms):
    _, model, processor = composed
    options = {"max_new_tokens": 5, "do_sample": False}
    inputs = processor.apply_transcription_request(waveforms[:3])

    def texts(inputs):
        ids = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        return processor.batch_decode(ids, skip_special_tokens=True)

    for wave, text in zip(waveforms[:3], texts(inputs), strict=True):
        assert texts(processor.apply_transcription_request(wave)) == [text]


def test_layouts_without_a_template_or_an_end_token_are_chatml():
    assert layout_of(make_tokenizer("llama", template="")) is None
    plain = LOOP + "{{- message.role + ': ' + message.content + '\\n' -}}{%- endfor -%}" + PROMPT
    assert layout_of(make_tokenizer("llama", template=plain + "{{- 'assistant: ' -}}{%- endif -%}")) is None
    assert CHATML.markers == ()


def test_the_system_prompt_begins_the_question_where_the_template_has_no_system_role():
    refusal = "{%- if messages[0].role == 'system' -%}{{- raise_exception('no system role') -}}{%- endif -%}"
    layout = layout_of(make_tokenizer("gemma3_text", template=refusal + TEMPLATES["gemma3_text"]))
    text = chat.render(dialogue(None), "<audio>", layout=layout)
    assert text == "<bos><start_of_turn>user\nBe brief.\n\nWrite 0: <audio><end_of_turn>\n<start_of_turn>model\n"
