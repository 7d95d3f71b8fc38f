#!/usr/bin/env bash
# Measures whether a model still uses hotwords after fine-tuning. Real voices (Free Spoken Digit Dataset); four-digit codes are
# the hotwords.
#   bash benchmarks/hotwords.sh DATA_DIR OUTPUT_DIR
# A small model learns digits. Then its LLM learns to choose a code from a list: first with only one audible digit (`choose`),
# then with two of four (`base`). The base model is fine-tuned on new recordings of one speaker in three variants: `without`
# hotwords, with the `true` ones only, and `with` distractors, where some rows have no list. All models decode new codes without
# a list, with a list that contains the code, and with other codes only.
# DATA_DIR has train/ and test/, each with wav.scp, text and utt2spk (Kaldi). CHOOSE_STEPS sets the steps of the longest stage.
set -euo pipefail
data=$1 out=$2
export TOKENIZERS_PARALLELISM=false
mkdir -p "$out"
python3 benchmarks/hotwords_data.py "$data" "$out/data"
# Choosing from a list requires a larger LLM than digits: 0.69 M parameters instead of 0.30 M.
sed -e 's/num_hidden_layers: 2/num_hidden_layers: 3/' -e 's/hidden_size: 96/hidden_size: 128/' \
    -e 's/intermediate_size: 288/intermediate_size: 384/' recipes/configs/models/tiny.yaml > "$out/model.yaml"
python3 recipes/compose_model.py "$out/model.yaml" --transcripts "$out/data/lines.txt" --vocab_size 400 --output_dir "$out/init"

train() { # MODEL ROWS STEPS NAME [options]
    python3 recipes/finetune.py recipes/configs/quickstart.yaml --model_name_or_path "$1" --train_file "$2" --max_steps "$3" \
        --output_dir "$out/$4" --per_device_train_batch_seconds 60 --eval_strategy no --disable_tqdm true "${@:5}"
}
plain="--spec_augment false --tempo_perturb 0"
# Encoder and adaptor already encode the digits. First the LLM copies any word of the list; it chooses after 1,000 steps or more.
lists="$plain --freeze_audio_encoder true --freeze_audio_adaptor true --cache_level adaptor
    --lr_scheduler_type constant_with_warmup --warmup_steps 20 --hotword_distractors 3 --hotword_dropout 0.1"
tuned="$plain --learning_rate 5e-4"
train "$out/init" "$out/data/clean.jsonl" 800 digits --hotword_dropout 1
train "$out/digits" "$out/data/choose.jsonl" "${CHOOSE_STEPS:-2000}" choose $lists --learning_rate 2e-3
train "$out/choose" "$out/data/base.jsonl" 600 base $lists
train "$out/base" "$out/data/adapt.jsonl" 400 without $tuned --hotword_dropout 1
train "$out/base" "$out/data/adapt.jsonl" 400 true $tuned
train "$out/base" "$out/data/adapt.jsonl" 400 with $tuned --hotword_distractors 3 --hotword_dropout 0.3

for model in base without true with; do
    for list in none list others; do
        python3 recipes/decode.py --model_name_or_path "$out/$model" --jsonl_file "$out/data/test_$list.jsonl" \
            --output_file "$out/$model.$list.txt" --max_new_tokens 8
        # Without a list, score.py counts the words of the list that contains the code.
        python3 recipes/score.py "$out/data/test_${list/none/list}.jsonl" "$out/$model.$list.txt" \
            --output_dir "$out/score/$model.$list" --no_audio
    done
done
python3 - "$out/score" <<'PYTHON'
import json, pathlib, sys

print("model", "list", "WER %", "recall %", "precision %", "said", "written", "found", sep="\t")
for model in ("base", "without", "true", "with"):
    for name in ("none", "list", "others"):
        score = json.loads(pathlib.Path(sys.argv[1], f"{model}.{name}", "score.json").read_text())
        words = score["hotwords"]
        shares = [f"{100 * words[key]:.1f}" if words[key] is not None else "-" for key in ("recall", "precision")]
        counts = (words[key] for key in ("said", "written", "found"))
        print(model, name, f"{100 * score['rate']:.1f}", *shares, *counts, sep="\t")
PYTHON
