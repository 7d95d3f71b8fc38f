#!/usr/bin/env bash
# Overfits 50 sentences of one real voice (Kathleen, CMU Arctic prompts), and scores CER on the same sentences.
#   bash benchmarks/kathleen_overfit.sh DATA_DIR OUTPUT_DIR [more options of finetune.py]
# LAUNCH="accelerate launch --config_file accelerate_configs/cpu.yaml" trains in two processes.
# DATA_DIR has train/wav.scp and train/text (Kaldi); the first 50 lines are used.
set -euo pipefail
data=$1 out=$2
shift 2
export TOKENIZERS_PARALLELISM=false
mkdir -p "$out"
head -n 50 "$data/train/text" > "$out/text"
awk -v folder="$(realpath "$data/train")" 'NR <= 50 {print $1, folder "/" $2}' "$data/train/wav.scp" > "$out/wav.scp"
python3 recipes/compose_model.py recipes/configs/models/tiny.yaml --transcripts "$out/text" --output_dir "$out/init"
python3 recipes/scp2jsonl.py --scp_file "$out/wav.scp" --transcript_file "$out/text" \
    --jsonl_file "$out/train.jsonl" --model_name_or_path "$out/init"
${LAUNCH:-python3} recipes/finetune.py recipes/configs/quickstart.yaml --model_name_or_path "$out/init" \
    --train_file "$out/train.jsonl" --output_dir "$out/model" --eval_strategy no --num_train_epochs 150 \
    --per_device_train_batch_seconds 30 --spec_augment false --tempo_perturb 0 "$@"
python3 recipes/decode.py --model_name_or_path "$out/model" --scp_file "$out/wav.scp" \
    --output_file "$out/hyp.txt" --max_new_tokens 100
for name in text hyp.txt; do
    python3 recipes/whisper_mix_normalize.py "$out/$name" "$out/$name.norm"
done
compute-wer --char "$out/text.norm" "$out/hyp.txt.norm" "$out/cer.txt"
tail -n8 "$out/cer.txt"
