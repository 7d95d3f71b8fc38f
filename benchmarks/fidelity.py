"""Prints the table of docs/explanation/fidelity.md: golden vectors of the original, transformers, this project.

python benchmarks/fidelity.py GOLDEN [--row losses]

GOLDEN contains `model/` (FunASR's format), `data.jsonl`, `audio/`, `golden.safetensors` and `inference.json`, computed
with FunASR's classes without dither. The native model has the same weights (our export). All models compute in float32
on the CPU.
"""

import argparse
import json
import os
import tempfile
from datetime import date
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

from hf_speechllm import SpeechLLMForConditionalGeneration, SpeechLLMProcessor
from hf_speechllm.audio.waveform import load_audio
from hf_speechllm.formats.saving import save_native
from hf_speechllm.model import chat
from hf_speechllm.model.modeling import PARTS


def worst(found, expected) -> float:
    return max(float((torch.as_tensor(a) - b).abs().max()) for a, b in zip(found, expected, strict=True))


def span(values) -> str:
    low, high = (f"{float(value):.6g}" for value in (min(values, default=0), max(values, default=0)))
    return (low if low == high else f"{low} to {high}") if len(values) else "not possible"


def load_native(model, processor):
    with tempfile.TemporaryDirectory() as folder:
        save_native(model, processor, f"{folder}/native", force=True)
        file = Path(folder, "native/config.json")
        config = json.loads(file.read_text(encoding="utf-8"))
        # Our export sets the adaptor's mask and LayerNorm epsilon; here the native class's defaults are restored.
        del config["attn_implementation"], config["adaptor_config"]["layer_norm_eps"]
        file.write_text(json.dumps(config), encoding="utf-8")
        native = transformers.FunAsrNanoForConditionalGeneration.from_pretrained(f"{folder}/native").eval()
        return native, transformers.AutoProcessor.from_pretrained(f"{folder}/native")


@torch.no_grad()
def measure() -> list[tuple]:
    golden, table = load_file("golden.safetensors"), []

    def add_tensors(row, quantity, found, expected):
        stock, ours = (f"{worst(tensors, expected):.1e}" for tensors in found)
        table.append((row, quantity, "reference", stock, ours, ours))

    def add_numbers(row, quantity, expected, stock, ours):
        table.append((row, quantity, *map(span, (expected, stock, ours)), f"{worst(ours, expected):.1e}"))

    def add_same(row, quantity, found, expected):  # the native processor lacks the last row, which has several turns
        equal = [sum(a == b for a, b in zip(side, expected, strict=False)) for side in found]
        cells = [f"{count} of {len(expected)}" for count in equal]
        table.append((row, quantity, "reference", *cells, "none" if equal[1] == len(expected) else "differs"))

    dialogues = [json.loads(line)["messages"] for line in Path("data.jsonl").read_text(encoding="utf-8").splitlines()]
    model = SpeechLLMForConditionalGeneration.from_pretrained("model", dtype=torch.float32)
    processor = SpeechLLMProcessor.from_pretrained("model")
    native, native_processor = load_native(model, processor)

    mine, theirs = {}, {}  # inputs by name; the native processor accepts one recording per dialogue
    for messages in dialogues:
        paths = chat.parse_messages(messages).recordings
        name = Path(paths[0]).stem if len(paths) == 1 else "multiturn"
        mine[name] = processor.apply_chat_template(messages)
        if len(paths) == 1:
            text = native_processor.apply_chat_template(messages, tokenize=False)
            theirs[name] = native_processor(text=text, audio=load_audio(paths[0], 16000), output_labels=True)

    def right(key, names=theirs):
        return [golden[f"{name}.{key}"] for name in names]

    # Each module gets the original's input; the encoder also gets our features and the native features.
    lfr, encoded, adapted = right("lfr"), right("encoder_out"), right("adaptor_out")
    features = [[batch[name]["input_features"][0] for name in theirs] for batch in (theirs, mine)]
    towers = native.model.audio_tower, model.audio_encoder
    adaptors = native.model.multi_modal_projector, model.audio_adaptor

    def encode(tower, items):
        return [tower(item[None], torch.ones(1, len(item)).long()).last_hidden_state[0] for item in items]

    def adapt(adaptor, items):
        masks = [torch.ones(len(item)).long() for item in items]
        out = adaptor(pad_sequence(items, batch_first=True), pad_sequence(masks, batch_first=True))
        out = out[0] if isinstance(out, tuple) else out
        return [row[: len(item)] for row, item in zip(out, items, strict=True)]

    add_tensors("features", "input features", features, lfr)
    for source, inputs in (("the original's features", (lfr, lfr)), ("the recording", features)):
        add_tensors("encoder", f"encoder output from {source}", map(encode, towers, inputs), encoded)
    found = [[adapt(adaptor, [item])[0] for item in encoded] for adaptor in adaptors]
    add_tensors("adaptor", "adaptor output, one recording", found, adapted)
    add_tensors("adaptor", "adaptor output, padded batch", [adapt(item, encoded) for item in adaptors], adapted)

    # Ids and labels
    def ids(row):  # consecutive audio placeholders become one 0; their number has its own row
        row = [0 if token == processor.audio_token_id else int(token) for token in row]
        return [token for index, token in enumerate(row) if token or not index or row[index - 1]]

    sides, audio_id = (theirs, mine), processor.audio_token_id
    audio = [[int((side[name]["input_ids"] == audio_id).sum()) for name in theirs] for side in sides]
    add_numbers("tokens", "audio tokens per recording", right("fake_token_len"), *audio)
    counts = [[int((side[name]["labels"] != -100).sum()) for name in theirs] for side in sides]
    add_numbers("labels", "supervised tokens per row", [(row != -100).sum() for row in right("labels")], *counts)
    for column, convert in (("input_ids", ids), ("labels", torch.Tensor.tolist)):
        found = [[convert(batch[column][0]) for batch in side.values()] for side in sides]
        add_same("labels", f"`{column}` of a training row", found, [convert(row) for row in right(column, mine)])
    # Losses and gradients
    models = native, model
    stock, ours = ([float(m(**b).loss) for b in side.values()] for m, side in zip(models, sides, strict=True))
    add_numbers("losses", "loss of a row", right("loss", mine), stock, ours)
    for batch, count in zip(theirs.values(), counts[1], strict=True):
        batch["labels"][:, :-count] = -100
    stock, ours = [float(native(**batch).loss) for batch in theirs.values()], ours[: len(theirs)]
    add_numbers("losses", "loss of a row, native with the original's labels", right("loss"), stock, ours)
    with torch.enable_grad():
        loss = model(**processor.apply_chat_template(dialogues)).loss
        loss.backward()
    add_numbers("losses", "loss of a padded batch of all rows", [golden["batch.loss"]], [], [float(loss)])
    for part in PARTS:
        norm = torch.stack([parameter.grad.norm() for parameter in getattr(model, part).parameters()]).norm()
        add_numbers("losses", f"gradient norm, {part}", [golden[f"batch.grad_norm.{part}"]], [], [float(norm)])
    # Decoding
    settings = json.loads(Path("inference.json").read_text(encoding="utf-8"))
    asked = [], []
    for item in settings:
        wave, language, words = load_audio(f"audio/{item['id']}.wav", 16000), item["language"], item["hotwords"]
        asked[0].append(native_processor.apply_transcription_request(wave, language, keywords=words or None))
        asked[1].append(processor.apply_transcription_request(wave, language, item["itn"], words))
    found = [[ids(inputs["input_ids"][0]) for inputs in side] for side in asked]
    add_same("decoding", "prompt", found, [ids(item["source_ids"]) for item in settings])
    options = {"max_new_tokens": 12, "do_sample": False}
    found = [
        [m.generate(**x, **options)[0, -12:].tolist() for x in side] for m, side in zip(models, asked, strict=True)
    ]
    add_same("decoding", "12 greedily decoded ids", found, [item["generated_ids"] for item in settings])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golden", type=Path, help="folder of the golden vectors")
    parser.add_argument("--row", help="print only the rows of this name")
    args = parser.parse_args()
    os.chdir(args.golden)
    print(f"{date.today()}, torch {torch.__version__}, transformers {transformers.__version__}")
    for line in measure():
        if args.row in (None, line[0]):
            print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
