#!/usr/bin/env bash
# Measures speed and memory of the released size (0.83 B parameters, random weights) on one GPU: 20 steps per configuration.
#   bash benchmarks/full_size.sh TOKENIZER DATA_DIR OUTPUT_DIR
# TOKENIZER is a folder or Hub id of Qwen3-0.6B's tokenizer. DATA_DIR has wav.scp and text (Kaldi).
set -euo pipefail
tokenizer=$1 data=$2 out=$3
export TOKENIZERS_PARALLELISM=false
mkdir -p "$out"
python3 recipes/compose_model.py recipes/configs/models/fun_asr_nano.yaml --tokenizer "$tokenizer" --output_dir "$out/init"
python3 recipes/scp2jsonl.py --scp_file "$data/wav.scp" --transcript_file "$data/text" \
    --jsonl_file "$out/train.jsonl" --model_name_or_path "$out/init"
for config in llm_only adaptor_only all lora; do
    python3 recipes/finetune.py recipes/configs/$config.yaml --model_name_or_path "$out/init" \
        --train_file "$out/train.jsonl" --output_dir "$out/$config" --max_steps 20 --logging_steps 5 --save_strategy no
    python3 benchmarks/summarize_run.py "$out/$config" --name "$config" | tee -a "$out/full_size.jsonl"
    rm -rf "$out/$config"
done
