#!/usr/bin/env bash
# Real voices from scratch: spoken digits (Free Spoken Digit Dataset, official split, 8 kHz), scored by WER on its test set.
#   bash benchmarks/fsdd_en.sh DATA_DIR OUTPUT_DIR [more options of finetune.py]
# LAUNCH="accelerate launch --config_file accelerate_configs/cpu.yaml" trains in two processes.
# DATA_DIR: with train/ and test/, each wav.scp and text (Kaldi).
set -euo pipefail
data=$1 out=$2
shift 2
export TOKENIZERS_PARALLELISM=false
mkdir -p "$out"
python3 recipes/compose_model.py recipes/configs/models/tiny.yaml --transcripts "$data/train/text" \
    --vocab_size 300 --output_dir "$out/init"
python3 recipes/scp2jsonl.py --scp_file "$data/train/wav.scp" --transcript_file "$data/train/text" \
    --jsonl_file "$out/train.jsonl" --model_name_or_path "$out/init"
${LAUNCH:-python3} recipes/finetune.py recipes/configs/quickstart.yaml --model_name_or_path "$out/init" \
    --train_file "$out/train.jsonl" --output_dir "$out/model" --eval_strategy no --num_train_epochs 30 "$@"
python3 recipes/decode.py --model_name_or_path "$out/model" --scp_file "$data/test/wav.scp" \
    --output_file "$out/hyp.txt" --max_new_tokens 20
for pair in "$data/test/text ref" "$out/hyp.txt hyp"; do
    python3 recipes/whisper_mix_normalize.py ${pair% *} "$out/${pair#* }.norm"
done
compute-wer "$out/ref.norm" "$out/hyp.norm" "$out/wer.txt"
tail -n8 "$out/wer.txt"
