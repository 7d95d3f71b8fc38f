#!/usr/bin/env bash
# Trains on real voices from random weights: spoken digits (Free Spoken Digit Dataset, official split, 8 kHz). Keeps the
# checkpoint with the lowest error rate on held-out training recordings, scores WER on the test set, and compares with the
# model before training.
#   bash benchmarks/fsdd_en.sh DATA_DIR OUTPUT_DIR [more options of finetune.py]
# LAUNCH="accelerate launch --config_file accelerate_configs/cpu.yaml" trains in two processes.
# DATA_DIR has train/ and test/, each with wav.scp, text and utt2spk (Kaldi).
set -euo pipefail
data=$1 out=$2
shift 2
export TOKENIZERS_PARALLELISM=false
mkdir -p "$out"
python3 recipes/compose_model.py recipes/configs/models/tiny.yaml --transcripts "$data/train/text" \
    --vocab_size 300 --output_dir "$out/init"
python3 recipes/scp2jsonl.py --scp_file "$data/train/wav.scp" --transcript_file "$data/train/text" \
    --jsonl_file "$out/all.jsonl" --model_name_or_path "$out/init"
awk 'NR % 18 == 0' "$out/all.jsonl" > "$out/dev.jsonl" # 100 recordings
awk 'NR % 18 != 0' "$out/all.jsonl" > "$out/train.jsonl"
${LAUNCH:-python3} recipes/finetune.py recipes/configs/quickstart.yaml --model_name_or_path "$out/init" \
    --train_file "$out/train.jsonl" --validation_file dev="$out/dev.jsonl" --output_dir "$out/model" --num_train_epochs 30 \
    --eval_cer --eval_max_new_tokens 20 --eval_steps 0.125 --save_strategy steps --save_steps 0.125 \
    --keep_best_checkpoints 3 --average_best --load_best_model_at_end "$@"

for name in init model; do # before and after training
    python3 recipes/decode.py --model_name_or_path "$out/$name" --scp_file "$data/test/wav.scp" \
        --output_file "$out/$name.txt" --max_new_tokens 20
done
for pair in "$data/test/text ref" "$out/model.txt hyp"; do
    python3 recipes/whisper_mix_normalize.py ${pair% *} "$out/${pair#* }.norm"
done
compute-wer "$out/ref.norm" "$out/hyp.norm" "$out/wer.txt"
tail -n8 "$out/wer.txt"
python3 recipes/score.py "$data/test/text" "$out/model.txt" --compare "$out/init.txt" --output_dir "$out/score" \
    --scp_file "$data/test/wav.scp" --utt2dataset "$data/test/utt2spk"
counts() { grep -E '^[A-Z][A-Za-z]* -> ' "$1" | sort; }
diff <(counts "$out/wer.txt") <(counts "$out/score/cer.txt") && echo "score.py and compute-wer give the same counts"
