"""Models from pretrained encoders and LLMs: composition, training, decoding and resuming, from the command line."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForCTC,
    PreTrainedTokenizerFast,
    Wav2Vec2FeatureExtractor,
)

from hf_speechllm import SpeechLLMProcessor
from hf_speechllm.data.dataset import prepare_rows
from hf_speechllm.data.options import DataOptions
from hf_speechllm.formats.composition import compose

SPECIAL = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
TEMPLATE = (
    "{{- bos_token -}}{%- for message in messages -%}{{- '<start_of_turn>' + message.role + '\\n' + message.content "
    "+ '<end_of_turn>\\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<start_of_turn>assistant\\n' -}}"
    "{%- endif -%}"
)
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48}
WAVEFORMS = {
    **LAYERS, "conv_dim": [8, 8, 8], "conv_kernel": [10, 8, 4], "conv_stride": [5, 8, 8],
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "vocab_size": 20,
}  # fmt: skip
MOONSHINE = {
    "hidden_size": 16, "intermediate_size": 24, "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 1,
    "encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2, "encoder_num_key_value_heads": 2,
    "decoder_num_key_value_heads": 2, "vocab_size": 50,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["one two three four"], trainer)
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<bos>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **special)


@pytest.fixture(scope="module")
def pretrained(tokenizer, tmp_path_factory):
    """Writes tiny random models as they are published: `pretrained(model_type, builder, ...)` returns the folder."""

    def make(model_type, builder, **sizes):
        folder = tmp_path_factory.mktemp(model_type)
        torch.manual_seed(0)
        builder.from_config(AutoConfig.for_model(model_type, **sizes)).save_pretrained(folder)
        if builder is AutoModelForCausalLM:
            tokenizer.save_pretrained(folder)
        else:
            Wav2Vec2FeatureExtractor(do_normalize=model_type != "moonshine").save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def llm(pretrained, tokenizer):
    return pretrained(
        "gemma3_text", AutoModelForCausalLM, vocab_size=len(tokenizer), head_dim=16, num_key_value_heads=1, **LAYERS
    )


def losses_of(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    return [line["loss"] for line in state["log_history"] if "loss" in line]


@pytest.mark.parametrize("how", [("--use_lora", "true", "--cache_level", "encoder"), ("--feature_cache", "off")])
def test_from_published_parts_to_transcripts(how, pretrained, llm, tiny_corpus, tmp_path, run_recipe):
    encoder = pretrained("hubert", AutoModelForCTC, **WAVEFORMS)
    init, trained = tmp_path / "init", tmp_path / "trained"
    assert not run_recipe(
        "compose_model.py", "models/linear_adaptor", "--audio_encoder", encoder, "--llm", llm, "--output_dir", init
    )
    frozen = ["--freeze_audio_encoder", "true"] if "--use_lora" in how else []
    assert not run_recipe(
        "finetune.py", "--model_name_or_path", init, "--train_file", tiny_corpus.jsonl, "--output_dir", trained,
        "--num_train_epochs", 8, "--learning_rate", "3e-3", "--audio_adaptor_learning_rate", "1e-2", "--lora_r", 4,
        "--per_device_train_batch_seconds", 4, "--logging_steps", 8, "--save_strategy", "no", "--report_to", "none",
        "--cache_dir", tmp_path / "cache", "--preprocessing_num_workers", 1, "--use_cpu", "true", *frozen, *how,
    )  # fmt: skip
    losses = losses_of(trained)
    assert losses[-1] < (0.97 if frozen else 0.7) * losses[0]
    output = tmp_path / "hyp.txt"
    assert not run_recipe(
        "decode.py", "--model_name_or_path", trained, "--scp_file", tiny_corpus.scp, "--output_file", output,
        "--max_new_tokens", 12,
    )  # fmt: skip
    texts = [line.partition("\t")[2] for line in output.read_text(encoding="utf-8").splitlines()]
    assert len(texts) == 24
    assert not any(token in text for text in texts for token in SPECIAL)


def test_a_resumed_run_of_a_waveform_encoder_is_bit_identical(
    pretrained, llm, tiny_corpus, make_trainer, tmp_path, interrupt
):
    encoder = pretrained("moonshine", AutoModel, **MOONSHINE)
    for part in compose({"audio_adaptor_config": {"adaptor_type": "linear"}}, str(llm), str(encoder), str(llm)):
        part.save_pretrained(tmp_path / "init")
    processor = SpeechLLMProcessor.from_pretrained(tmp_path / "init")
    data = DataOptions(cache_dir=str(tmp_path / "cache"), preprocessing_num_workers=1)
    rows = prepare_rows([str(tiny_corpus.jsonl)], processor, 1 << 24, data)[0]
    options = {
        "model_name_or_path": str(tmp_path / "init"), "train_dataset": rows, "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    make_trainer(**options, output_dir=str(tmp_path / "whole")).train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer([interrupt(3)], **options, output_dir=str(tmp_path / "again")).train()
    make_trainer(**options, output_dir=str(tmp_path / "again")).train(resume_from_checkpoint=True)
    whole, again = (load_file(tmp_path / name / "checkpoint-4/model.safetensors") for name in ("whole", "again"))
    assert whole.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_an_encoder_without_its_weights_is_refused(pretrained, llm, tmp_path):
    encoder = pretrained("hubert", AutoModel, **WAVEFORMS)
    tensors = load_file(encoder / "model.safetensors")
    del tensors["encoder.layers.1.attention.k_proj.weight"]
    from safetensors.torch import save_file

    save_file(tensors, encoder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing, for example encoder\.layers\.1\.attention\.k_proj"):
        compose({}, str(llm), str(encoder), str(llm))
