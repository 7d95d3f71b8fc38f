"""Training with augmented waveforms: resumed runs, validation, Python and the command line."""

import json

import datasets
import numpy as np
import pytest
import soundfile
import torch

from hf_speechllm import (
    AugmentationOptions,
    SpeechLLMForConditionalGeneration,
    SpeechLLMProcessor,
    SpeechLLMTrainer,
    SpeechLLMTrainingArguments,
    prepare_dataset,
)
from hf_speechllm.data.collator import SpeechLLMCollator
from hf_speechllm.data.dataset import prepare_rows
from hf_speechllm.data.options import DataOptions
from hf_speechllm.training.run import find_checkpoint

OPTIONS = {
    "feature_cache": "off", "noise_prob": 0.7, "speed_prob": 0.5, "codec_prob": 0.2, "spec_augment": True,
    "max_steps": 8, "per_device_train_batch_seconds": 6.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def uncached_rows(tiny_model, tiny_corpus, tmp_path_factory):
    processor = SpeechLLMProcessor.from_pretrained(tiny_model)
    cache = str(tmp_path_factory.mktemp("cache"))
    options = DataOptions(cache_dir=cache, feature_cache="off", preprocessing_num_workers=1)
    return prepare_rows([str(tiny_corpus.jsonl)], processor, 2048, options)[0]


@pytest.fixture
def noises(tmp_path):
    folder = tmp_path / "noises"
    folder.mkdir()
    soundfile.write(folder / "hum.wav", 0.1 * np.sin(np.arange(8000) / 20), 16000)
    return folder


def weights_of(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def test_a_resumed_run_ends_with_the_same_weights(make_trainer, uncached_rows, noises, interrupt, tmp_path, caplog):
    """The second epoch starts after 7 steps. Only the resumed run uses workers."""
    options = {**OPTIONS, "train_dataset": uncached_rows, "noise_source": ["white", "babble", str(noises)]}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    assert whole.state.epoch > 1
    expected = weights_of(whole)
    options |= {"save_strategy": "steps", "save_steps": 3}
    with pytest.raises(KeyboardInterrupt):
        make_trainer([interrupt(4)], **options).train()
    resumed = make_trainer(**options, resume_from_checkpoint="last", dataloader_num_workers=2)
    resumed.train(resume_from_checkpoint=find_checkpoint(resumed.args))
    for name, value in weights_of(resumed).items():
        assert torch.equal(value, expected[name]), name

    soundfile.write(noises / "hiss.wav", 0.1 * np.ones(8000), 16000)
    changed = make_trainer(**options | {"noise_prob": 0.6, "max_steps": 9})
    caplog.clear()
    changed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    (line,) = [text for text in caplog.messages if "changed since" in text]
    assert "--noise_prob 0.7 -> 0.6" in line and "augmentation.noises" in line


def test_rows_of_a_dataset_train_with_augmentation_and_validate_without(tiny_model, tiny_corpus, tmp_path):
    paths, texts = (
        [line.split(maxsplit=1)[1].strip() for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (tiny_corpus.scp, tiny_corpus.text)
    )
    contents = [soundfile.read(path) for path in paths]
    audio = [
        {"array": samples, "sampling_rate": rate} if number % 2 else {"path": path}
        for number, (path, (samples, rate)) in enumerate(zip(paths, contents, strict=True))
    ]
    processor = SpeechLLMProcessor.from_pretrained(tiny_model)
    kinds = [
        datasets.Dataset.from_dict({"audio": audio[1::2], "text": texts[1::2]}),  # arrays
        datasets.Dataset.from_dict({"audio": paths[::2], "text": texts[::2]}),
        datasets.Dataset.from_dict({"audio": paths, "text": texts}).cast_column("audio", datasets.Audio()),
    ]
    for dataset in kinds:
        rows = prepare_dataset(dataset, processor, feature_dtype="off")
        cached = prepare_dataset(dataset, processor, feature_dtype="float32")
        assert "features" not in rows.column_names
        assert rows["num_frames"][:] == cached["num_frames"][:] and rows["messages"][:] == cached["messages"][:]
        batches = [SpeechLLMCollator(processor)([item[index] for index in range(5)]) for item in (rows, cached)]
        assert torch.equal(batches[0]["input_features"], batches[1]["input_features"])

    args = SpeechLLMTrainingArguments(output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to="none")
    trainer = SpeechLLMTrainer(
        model=SpeechLLMForConditionalGeneration.from_pretrained(tiny_model),
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=processor,
        augmentation=AugmentationOptions(noise_prob=1.0, speed_prob=1.0, spec_augment=True),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    plain = [SpeechLLMCollator(processor)([row])["input_features"][0] for row in rows]
    shown = [
        features[mask.bool()]
        for features, mask in zip(batch["input_features"], batch["input_features_mask"], strict=True)
    ]
    assert not any(torch.equal(features, other) for features in shown for other in plain)
    validation = next(iter(trainer.get_eval_dataloader()))
    shown = [
        features[mask.bool()]
        for features, mask in zip(validation["input_features"], validation["input_features_mask"], strict=True)
    ]
    assert all(any(torch.equal(features, other) for other in plain) for features in shown)
    trainer.train()
    record = json.loads((tmp_path / "checkpoint-2" / "dependencies.json").read_text(encoding="utf-8"))
    assert record["options"]["noise_prob"] == 1.0 and record["options"]["speed_factors"] == [0.9, 1.1]


def test_contradictions_in_python_are_refused(make_trainer, tiny_rows, uncached_rows, tiny_model):
    with pytest.raises(ValueError, match="feature_dtype='off'"):
        make_trainer(train_dataset=tiny_rows, feature_cache="off", gain_prob=0.5)
    processor = SpeechLLMProcessor.from_pretrained(tiny_model)
    args = make_trainer(train_dataset=uncached_rows).args
    with pytest.raises(ValueError, match="augmentation and data_collator are both given"):
        SpeechLLMTrainer(
            model=SpeechLLMForConditionalGeneration.from_pretrained(tiny_model),
            args=args,
            data_collator=SpeechLLMCollator(processor),
            processing_class=processor,
            augmentation=AugmentationOptions(spec_augment=True),
        )


def test_the_command_trains_and_saves_what_training_hears(tiny_model, tiny_corpus, run_recipe, tmp_path, capsys):
    common = ["--model_name_or_path", tiny_model]
    augmentation = ["--noise_prob", "1", "--noise_snr", "3", "3", "--noise_source", "babble", "--gain_prob", "1"]
    heard = tmp_path / "heard"
    arguments = [*common, "--jsonl_file", tiny_corpus.jsonl, "--num_rows", 3]
    assert run_recipe("inspect_data.py", *arguments, "--save_audio", heard, *augmentation) == 0
    assert sorted(path.name for path in heard.iterdir()) == ["row0_0.wav", "row1_0.wav", "row2_0.wav"]

    capsys.readouterr()
    training = ["--train_file", tiny_corpus.jsonl, "--output_dir", tmp_path / "run", "--use_cpu", "true"]
    training += ["--max_steps", 1, "--feature_cache", "off", "--report_to", "none", "--cache_dir", tmp_path / "cache"]
    assert run_recipe("finetune.py", *common, *training, *augmentation) is None
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "| noise_prob | 1.0 |" in card and "codec_prob" not in card

    processor = SpeechLLMProcessor.from_pretrained(tiny_model)
    options = AugmentationOptions(noise_prob=1, noise_snr=[3, 3], noise_source=["babble"], gain_prob=1)
    collator = SpeechLLMCollator.augmenting(processor, options)
    options = DataOptions(cache_dir=str(tmp_path / "cache"), feature_cache="off")
    rows = prepare_rows([str(tiny_corpus.jsonl)], processor, 2048, options)[0]
    collator.use_training_rows(rows)
    (waveform,) = collator.row_waveforms({**rows[2], "seed": (42, 2)})  # as in the first epoch
    assert soundfile.read(heard / "row2_0.wav")[0] == pytest.approx(waveform, abs=1e-4)

    assert run_recipe("inspect_data.py", *arguments, *augmentation) == 2
    assert "--save_audio" in capsys.readouterr().err
    assert run_recipe("inspect_data.py", *arguments, "--save_audio", heard, "--gain_db", "1", "2") == 2
    assert "--gain_db has no effect without --gain_prob" in capsys.readouterr().err
    assert run_recipe(
        "finetune.py",
        *common,
        *training,
        "--output_dir",
        tmp_path / "b",
        "--reverb_prob",
        "1",
        "--reverb_source",
        "gone",
    ).endswith("error: --reverb_source: gone: no such folder")
