"""A snapshot of public names and signatures; a renamed object keeps its old name for one release."""

import importlib
import inspect
import subprocess
import sys

import pytest

import hf_speechllm

# Parameters; configurations also have those of transformers, which differ between its releases.
SIGNATURES = {
    "AudioAdaptorConfig": "adaptor_type, downsample_rate, use_low_frame_rate, encoder_hidden_size, hidden_size, "
    "projector_hidden_size, projector_hidden_act, num_hidden_layers, num_attention_heads, intermediate_size, "
    "hidden_act, hidden_dropout, attention_dropout, layer_norm_eps, initializer_range",
    "AugmentationOptions": "speed_prob, speed_factors, reverb_prob, reverb_source, reverb_seconds, noise_prob, "
    "noise_source, noise_snr, gain_prob, gain_db, telephone_prob, codec_prob, codec_kbps, spec_augment, "
    "tempo_perturb, dither",
    "FbankFeatureExtractor": "feature_size, sampling_rate, frame_length, frame_shift, window_type, num_frames_lfr, "
    "stride_lfr, waveform_scale, dither, padding_value, kwargs",
    "SpeechLLMConfig": "audio_encoder_config, audio_adaptor_config, llm_config, audio_token_id, initializer_range, "
    "tie_word_embeddings, funasr_files, ctc_head_config",
    "SpeechLLMForConditionalGeneration": "config",
    "SpeechLLMProcessor": "feature_extractor, tokenizer, chat_template, audio_token, downsample_rate, "
    "use_low_frame_rate, encoder_downsample_rate, think_block, system_prompt, encoder_convolutions, "
    "encoder_window, chat_layout",
    "SpeechLLMTrainer": "args, augmentation, eval_collator, train_weights, kwargs",
    "SpeechLLMTrainingArguments": "per_device_train_batch_seconds, eval_cer, padding_free, keep_best_checkpoints",
    "Transcriber": "model, processor, batch_seconds, max_new_tokens, num_beams, num_workers, repetition_guard, vad, "
    "cuda_graphs, fast, word_times, ctc_guard, ctc_draft, calibration, "
    "ctc_draft_threshold, ctc_weight",
    "compose": "config, tokenizer, audio_encoder, llm",
    "load_audio": "source, sampling_rate, max_seconds",
    "normalize_text": "text, language",
    "prepare_dataset": "dataset, processor, audio_column, text_column, language_column, hotwords_column, max_seconds, "
    "max_bad_fraction, feature_dtype, num_proc",
    "train_tokenizer": "texts, vocab_size",
}


def test_public_names_and_signatures_equal_the_snapshot():
    assert hf_speechllm.__all__ == sorted(SIGNATURES)
    for name, expected in SIGNATURES.items():
        parameters = list(inspect.signature(getattr(hf_speechllm, name)).parameters)
        if name.endswith(("Config", "Arguments")):
            missing = {*expected.split(", ")} - {*parameters}
            assert not missing, name
        else:
            assert parameters == expected.split(", "), name


def test_names_for_type_checkers_equal_the_imported_names():
    for name in hf_speechllm.__all__:
        assert name in dir(hf_speechllm)
        home = importlib.import_module(f"hf_speechllm.{hf_speechllm._HOMES[name]}")
        assert getattr(hf_speechllm, name) is getattr(home, name)
    with pytest.raises(AttributeError, match="Transcribers"):
        _ = hf_speechllm.Transcribers


def test_import_registers_the_classes_and_loads_no_training_code(tiny_model):
    script = (
        "import sys, hf_speechllm\n"
        "print([name for name in ('datasets', 'peft', 'hf_speechllm.training') if name in sys.modules])\n"
        "from transformers import AutoModel, AutoProcessor\n"
        f"print(type(AutoModel.from_pretrained({str(tiny_model)!r})).__name__)\n"
        f"print(type(AutoProcessor.from_pretrained({str(tiny_model)!r})).__name__)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["[]", "SpeechLLMForConditionalGeneration", "SpeechLLMProcessor"]
