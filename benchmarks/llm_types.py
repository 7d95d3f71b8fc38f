"""Which types of LLMs of transformers can be composed: a tiny random LLM of each type. Prints JSON lines.

python benchmarks/llm_types.py > llm_types.jsonl
python benchmarks/llm_types.py qwen3_5_text granite

A type works if recordings decoded together have the logits of recordings decoded alone, the loss is that of the LLM's
own logits, and a training step gives the adaptor a gradient. A type whose config cannot be made tiny is `not tried`.
Encoder and adaptor: recipes/configs/models/tiny.yaml.
"""

import argparse
import json
import logging
import tempfile

import numpy as np
import torch
import transformers
import yaml
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from workload import MODELS

from hf_speechllm import SpeechLLMConfig
from hf_speechllm.formats.composition import compose, train_tokenizer

HYBRID = ["mamba", "mamba", "attention", "mamba"]
SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "state_size": 4, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 32,
    "d_model": 16, "n_layers": 2, "n_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 16, "moe_intermediate_size": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "mamba_d_ssm": 32,
    "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 8,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "shared_expert_intermediate_size": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "rotary_dim": 4,
}  # fmt: skip
OWN_SIZES = {
    "granitemoehybrid": {"layer_types": HYBRID},
    "bamba": {"attn_layer_indices": [2]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
}
MAX_PARAMETERS = 20_000_000
TOLERANCE = 1e-3


def tiny_llm(name: str, vocab_size: int) -> torch.nn.Module:
    """Returns a random LLM. Raises an error if the type has no such sizes."""
    default = AutoConfig.for_model(name)
    sizes = {key: value for key, value in SIZES.items() if hasattr(default, key)} | OWN_SIZES.get(name, {})
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(name, vocab_size=vocab_size, **ids, **sizes)
    with torch.device("meta"):
        number = sum(item.numel() for item in AutoModelForCausalLM.from_config(config).parameters())
    if number > MAX_PARAMETERS:
        raise ValueError(f"{number} parameters: its config has other names of sizes")
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return llm


def differences(model, processor) -> dict[str, float]:
    """Returns the largest differences of logits and loss, and the sum of the adaptor's absolute gradients."""
    rng = np.random.default_rng(0)
    waveforms = [0.1 * rng.standard_normal(samples).astype(np.float32) for samples in (8000, 16000, 12000)]
    options = {
        "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    together = model.eval().generate(**processor.apply_transcription_request(waveforms), **options).logits
    padding = 0.0
    for row, waveform in enumerate(waveforms):
        alone = model.generate(**processor.apply_transcription_request([waveform]), **options).logits
        padding = max(padding, *(float((a[row] - b[0]).abs().max()) for a, b in zip(together, alone, strict=True)))
    inputs = processor.apply_transcription_request(waveforms[:1])
    labels = inputs["input_ids"].clone()
    labels[:, :-6] = -100
    states, mask = model.encode_audio(inputs["input_features"], inputs["input_features_mask"])
    own = model.llm(inputs_embeds=model.embed(inputs["input_ids"], states, mask), use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(own[0, :-1].float(), labels[0, 1:])
    loss = model(**inputs, labels=labels).loss
    model.train()(**inputs, labels=labels).loss.backward()
    gradients = [item.grad.abs().sum() for item in model.audio_adaptor.parameters() if item.grad is not None]
    return {"padding": padding, "loss": float((loss - expected).abs()), "gradient": float(sum(gradients))}


def examine(name: str, tokenizer) -> dict:
    """Returns the result for a type of LLM."""
    config = yaml.safe_load((MODELS / "tiny.yaml").read_text(encoding="utf-8"))
    config.pop("llm_config")
    result = "not tried"
    try:
        with tempfile.TemporaryDirectory() as folder:
            tiny_llm(name, len(tokenizer)).save_pretrained(folder)
            result = "refused"
            model, processor = compose(config, tokenizer, llm=folder)
        result = "fails"
        found = differences(model, processor)
    except Exception as error:  # each type fails in its own way
        return {"result": result, "reason": f"{type(error).__name__}: {error}"[-200:]}
    works = max(found["padding"], found["loss"]) < TOLERANCE and found["gradient"] > 0
    return {"result": "works" if works else "differs", **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; default: all with a causal LLM in transformers")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = train_tokenizer(["one two three"], 280)
    for name in args.types or sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {SpeechLLMConfig.model_type}):
        line = {"llm": name, **examine(name, tokenizer), "transformers": transformers.__version__}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
