"""Comparison with FunASR on random tiny models; needs `pip install -e ".[funasr]"`."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.model import chat

funasr = pytest.importorskip("funasr")

# Additional settings of config.yaml.
CONFIGS = {
    "plain": {},
    "tied head": {},
    "thinking block": {"dataset_conf": {"do_think": False}},
    "no system prompt": {"dataset_conf": {"sys_prompt": False}},
    "LoRA": {"llm_conf": {"use_lora": True, "lora_conf": {"r": 4, "lora_alpha": 12}}},
    "other front-end": {"frontend_conf": {"window": "povey", "upsacle_samples": False}},
}
REQUESTS = [
    {"hotwords": [], "language": None, "itn": True},
    {"hotwords": ["hello", "New York"], "language": "中文", "itn": False},
    {"hotwords": [], "language": "德文", "itn": True},
]


@pytest.fixture(params=CONFIGS)
def pair(request, make_checkpoint):
    """The same checkpoint, loaded in FunASR and in this package."""
    folder = make_checkpoint("funasr", tied=request.param == "tied head")
    conf = yaml.safe_load((folder / "config.yaml").read_text())
    for section, values in CONFIGS[request.param].items():
        conf.setdefault(section, {}).update(values)
    (folder / "config.yaml").write_text(yaml.safe_dump(conf))
    if request.param == "LoRA":
        state = torch.load(folder / "model.pt", weights_only=True)["state_dict"]
        for name in [name for name in state if name.endswith(("q_proj.weight", "v_proj.weight")) and "llm" in name]:
            layer, (height, width) = name.removesuffix(".weight"), state[name].shape
            state[f"{layer}.lora_A"], state[f"{layer}.lora_B"] = torch.randn(4, width) / 4, torch.randn(height, 4) / 4
        torch.save({"state_dict": state}, folder / "model.pt")
    original = funasr.AutoModel(model=str(folder), device="cpu", disable_update=True, disable_pbar=True)
    return SimpleNamespace(
        original=original,
        conf=conf,
        model=SpeechLLMForConditionalGeneration.from_pretrained(folder),
        processor=SpeechLLMProcessor.from_pretrained(folder),
    )


@pytest.fixture
def recordings(make_wav):
    return [
        str(make_wav("a.wav", seconds=1.3)),
        str(make_wav("b.wav", seconds=2.1, rate=44100, channels=2)),
        str(make_wav("c.wav", seconds=0.02, rate=8000)),  # shorter than a window
    ]


def test_prompts_and_transcripts(pair, recordings):
    ids = []
    generate = pair.original.model.llm.generate

    def listen(**options):
        ids.append(generate(**options))
        return ids[-1]

    pair.original.model.llm.generate = listen
    for options in REQUESTS:
        for path in recordings:
            pair.original.generate(input=[path], max_length=8, batch_size=1, **options)
            inputs = pair.processor.apply_transcription_request(path, **options)
            found = pair.model.generate(**inputs, max_new_tokens=8, do_sample=False)
            assert found[0, inputs["input_ids"].shape[1] :].tolist() == ids[-1][0].tolist()
    if not pair.model.config.tie_word_embeddings:  # with tied weights, a random model repeats its last token
        assert len({tuple(item[0].tolist()) for item in ids}) > 2  # outputs depend on the requests


def test_training_ids_labels_losses_and_gradients(pair, recordings, tmp_path):
    from funasr.register import tables

    def speech(path):
        return f"<|startofspeech|>!{path}<|endofspeech|>"

    dialogues = [
        chat.transcription_messages(recordings[0], "语音转写：", "hello world"),
        chat.transcription_messages(recordings[2], "语音转写成中文：", "请"),
        [
            {"role": "user", "content": f"What is said in {speech(recordings[1])}?"},
            {"role": "assistant", "content": "world"},
            {"role": "user", "content": "And before?"},
            {"role": "assistant", "content": "nothing"},
            {"role": "user", "content": speech(recordings[0])},
            {"role": "assistant", "content": "hello"},
        ],
        [
            {"role": "user", "content": speech(recordings[1])},
            {"role": "assistant", "content": " world", "prev_content": "hello"},
        ],
    ]
    rows = [{"messages": messages, "speech_length": 100, "text_length": 5} for messages in dialogues]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    original, options = pair.original, pair.conf.get("dataset_conf", {})
    dataset = tables.dataset_classes["FunASR"](
        str(tmp_path / "rows.jsonl"), index_ds="FunASR", frontend=original.kwargs["frontend"],
        tokenizer=original.kwargs["tokenizer"], batch_type="example", retry=1, **options,
    )  # fmt: skip

    def batch(indices):
        collated = dataset.collator([dataset[index] for index in indices])
        return {name: value for name, value in collated.items() if isinstance(value, torch.Tensor)}

    audio_id = pair.processor.audio_token_id
    for index, messages in enumerate(dialogues):
        theirs, ours = batch([index]), pair.processor.apply_chat_template(messages)
        ids = ours["input_ids"].masked_fill(ours["input_ids"] == audio_id, 0)  # FunASR's placeholder
        assert torch.equal(ids, theirs["input_ids"])
        assert torch.equal(ours["labels"], theirs["labels_ids"])
        with torch.no_grad():
            assert pair.model(**ours).loss.item() == pytest.approx(original.model(**theirs)[0].item(), abs=1e-4)
    for parameter in (*original.model.parameters(), *pair.model.parameters()):
        parameter.requires_grad_(True)
    theirs = original.model(**batch(range(len(dialogues))))[0]
    ours = pair.model(**pair.processor.apply_chat_template(dialogues)).loss
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-4)
    theirs.backward()
    ours.backward()
    for part in ("audio_encoder", "audio_adaptor", "llm"):
        norms = []
        for model in (original.model, pair.model):
            named = getattr(model, part).named_parameters()
            gradients = [item.grad for name, item in named if item.grad is not None and "lora" not in name]
            norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
        assert norms[1] == pytest.approx(norms[0], rel=1e-3), part
