#!/usr/bin/env bash
# Does a model still listen to hotwords after fine-tuning? Real voices (Free Spoken Digit Dataset), four-digit codes as hotwords.
#   bash benchmarks/hotwords.sh DATA_DIR OUTPUT_DIR
# A base model is trained with hotwords on three speakers, then fine-tuned on a fourth: once on rows without hotwords
# (`without`), once with them among distractors, and some rows without any (`with`). All three decode codes that no training
# row has, in recordings that no training row has, without a list, with a list of 10 that holds the code, and with 10 others.
# DATA_DIR: with train/ and test/, each wav.scp, text and utt2spk (Kaldi). BASE_STEPS, ADAPT_STEPS, ADAPT_ROWS change the sizes.
set -euo pipefail
data=$1 out=$2
export TOKENIZERS_PARALLELISM=false
mkdir -p "$out"
python3 benchmarks/hotwords_data.py "$data" "$out/data" --adapt_rows "${ADAPT_ROWS:-600}"
sed 's/num_hidden_layers: 2/num_hidden_layers: 3/; s/hidden_size: 96/hidden_size: 128/; s/intermediate_size: 288/intermediate_size: 384/' \
    recipes/configs/models/tiny.yaml > "$out/model.yaml" # copying from a list takes a wider LLM than digits alone
python3 recipes/compose_model.py "$out/model.yaml" --transcripts "$out/data/lines.txt" --vocab_size 400 --output_dir "$out/init"

train() { # MODEL ROWS STEPS NAME [options]
    python3 recipes/finetune.py recipes/configs/quickstart.yaml --model_name_or_path "$1" --train_file "$2" --max_steps "$3" \
        --output_dir "$out/$4" --per_device_train_batch_seconds 60 --eval_strategy no --disable_tqdm true "${@:5}"
}
lists="--hotword_distractors 9 --hotword_dropout 0.3"
train "$out/init" "$out/data/base.jsonl" "${BASE_STEPS:-1100}" base $lists
train "$out/base" "$out/data/adapt.jsonl" "${ADAPT_STEPS:-150}" without --learning_rate 5e-4 --hotword_dropout 1
train "$out/base" "$out/data/adapt.jsonl" "${ADAPT_STEPS:-150}" with --learning_rate 5e-4 $lists

for model in base without with; do
    for list in none list others; do
        python3 recipes/decode.py --model_name_or_path "$out/$model" --jsonl_file "$out/data/test_$list.jsonl" \
            --output_file "$out/$model.$list.txt" --max_new_tokens 8
        # Without a list, the words of the list that holds the code are counted.
        python3 recipes/score.py "$out/data/test_${list/none/list}.jsonl" "$out/$model.$list.txt" \
            --output_dir "$out/score/$model.$list" --no_audio
    done
done
python3 - "$out/score" <<'PYTHON'
import json, pathlib, sys

print("model\tlist\tWER %\trecall %\tprecision %\tsaid\twritten\tfound")
for model in ("base", "without", "with"):
    for name in ("none", "list", "others"):
        score = json.loads(pathlib.Path(sys.argv[1], f"{model}.{name}", "score.json").read_text())
        words = score["hotwords"]
        shares = [f"{100 * words[key]:.1f}" if words[key] is not None else "-" for key in ("recall", "precision")]
        print(model, name, f"{100 * score['rate']:.1f}", *shares, words["said"], words["written"], words["found"], sep="\t")
PYTHON
