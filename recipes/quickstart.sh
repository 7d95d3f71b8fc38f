#!/usr/bin/env bash
# Trains, decodes and scores a small model in about three minutes on two idle CPU cores, without a GPU and without the Hub:
#   bash recipes/quickstart.sh [OUTPUT_DIR]
# The recordings are synthetic (eSpeak NG; recipes/quickstart_data/README.md). The commands for real data are the same.
set -euo pipefail
cd "$(dirname "$0")/.."
exp=${1:-exp/quickstart}
data=recipes/quickstart_data
rm -rf "$exp" && mkdir -p "$exp"
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE
processes=$(python -c "import os; print(min(2, os.cpu_count()))")

echo "== 1. Compose a small model with random weights; train a tokenizer on the transcripts"
python recipes/compose_model.py recipes/configs/models/tiny.yaml \
    --transcripts $data/train/text --vocab_size 340 --output_dir "$exp/init"

echo "== 2. Convert Kaldi lists to JSONL"
for split in train test; do
    python recipes/scp2jsonl.py --scp_file $data/$split/wav.scp --transcript_file $data/$split/text \
        --jsonl_file "$exp/$split.jsonl" --model_name_or_path "$exp/init"
done

echo "== 3. Fine-tune"
OMP_NUM_THREADS=1 accelerate launch --config_file accelerate_configs/cpu.yaml --num_processes "$processes" \
    recipes/finetune.py recipes/configs/quickstart.yaml --model_name_or_path "$exp/init" \
    --train_file "$exp/train.jsonl" --validation_file test="$exp/test.jsonl" --output_dir "$exp/model"

echo "== 4. Decode, normalise and score: before and after training"
python recipes/whisper_mix_normalize.py $data/test/text "$exp/ref.txt"
for name in init model; do
    python recipes/decode.py --model_name_or_path "$exp/$name" --scp_file $data/test/wav.scp \
        --output_file "$exp/$name.hyp" --max_new_tokens 40
    python recipes/whisper_mix_normalize.py "$exp/$name.hyp" "$exp/$name.hyp.norm"
    compute-wer --char "$exp/ref.txt" "$exp/$name.hyp.norm" "$exp/$name.cer.txt"
done
tail -n8 "$exp/model.cer.txt"

cer() { sed -n 's/^Overall -> *\([0-9.]*\) %.*/\1/p' "$exp/$1.cer.txt"; }
echo "Training curve: $exp/model/training_curve.png"
echo "CER before training: $(cer init) %"
echo "CER after training: $(cer model) %"
