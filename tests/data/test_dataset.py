"""From JSONL to rows: features are cached until an input changes; bad rows are reported with file and line."""

import json
import logging
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from hf_speechllm import FbankFeatureExtractor, SpeechLLMProcessor
from hf_speechllm.audio.waveform import load_audio
from hf_speechllm.data import dataset as dataset_module
from hf_speechllm.data.augmentation import SpecAugment, TempoPerturb, augmentations
from hf_speechllm.data.bad_rows import BadDataError
from hf_speechllm.data.collator import SpeechLLMCollator
from hf_speechllm.data.dataset import FeatureMapper, prepare_rows, row_seconds
from hf_speechllm.data.options import DataOptions
from hf_speechllm.model.loss import label_positions

LIMIT = 2048  # maximum number of encoder frames


@pytest.fixture
def corpus(tiny_corpus, tmp_path):
    """Copies of six recordings, which tests may damage, and their JSONL with relative paths."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = tiny_corpus.jsonl.read_text(encoding="utf-8").splitlines()[:6]
    for index in range(6):
        shutil.copy(tiny_corpus.folder / f"utt{index:02d}.wav", folder)
    text = "\n".join(line.replace(str(tiny_corpus.folder) + "/", "") for line in lines)
    (folder / "train.jsonl").write_text(text + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def edit(corpus):
    """Changes rows of the JSONL: `edit(line=function)`; lines count from 1; the function changes a row in place."""

    def change(lines, function, name="train.jsonl"):
        rows = [json.loads(line) for line in (corpus / "train.jsonl").read_text(encoding="utf-8").splitlines()]
        for line in lines:
            function(rows[line - 1])
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (corpus / name).write_text(text, encoding="utf-8")
        return corpus / name

    return change


@pytest.fixture
def prepare(corpus, processor, tmp_path):
    """Runs `prepare_rows` on the corpus, as the recipe does."""

    def run(*files, limit=LIMIT, feature_extractor=None, weights=(), **options):
        files = [str(file) for file in files] or [str(corpus / "train.jsonl")]
        limits = {"batch_seconds": options.pop("per_device_train_batch_seconds", 60)}
        limits["max_bad_fraction"] = options.pop("max_bad_fraction", 0.0)
        data = DataOptions(cache_dir=str(tmp_path / "cache"), **{"preprocessing_num_workers": 1, **options})
        if feature_extractor is not None:
            processor.feature_extractor = feature_extractor
        return prepare_rows(files, processor, limit, data, weights, **limits)

    return run


@pytest.fixture
def computed(monkeypatch):
    """Names of recordings whose features were computed; reset with `.clear()`."""
    names = []

    def load(source, rate, max_seconds):
        names.append(os.path.basename(source))
        return load_audio(source, rate, max_seconds)

    monkeypatch.setattr(dataset_module, "load_audio", load)
    return names


ALL = [f"utt{index:02d}.wav" for index in range(6)]


def test_rows_contain_the_inputs_of_the_model(prepare, corpus, processor):
    rows, weights = prepare()
    assert weights is None
    assert len(rows) == 6
    assert rows["line"] == [1, 2, 3, 4, 5, 6]
    assert rows["recordings"][0] == [str(corpus / "utt00.wav")]
    for row in rows:
        waveform = load_audio(row["recordings"][0])
        fbank = processor.feature_extractor.fbank(waveform)
        assert row["num_frames"] == [len(fbank)] == [row["speech_length"]]
    assert row_seconds(rows).tolist() == [length / 100 for length in rows["speech_length"]]


def test_second_run_computes_nothing(prepare, computed, tmp_path):
    first, _ = prepare()
    assert sorted(computed) == ALL
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")}
    assert files
    computed.clear()
    second, _ = prepare()
    assert computed == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")} == files
    assert second.to_dict() == first.to_dict()


def test_other_files_beside_a_file_do_not_invalidate_its_cache(prepare, computed, corpus):
    lines = (corpus / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, part in (("a.jsonl", lines[:2]), ("b.jsonl", lines[2:4]), ("c.jsonl", lines[4:])):
        (corpus / name).write_text("".join(part), encoding="utf-8")
    first, _ = prepare(corpus / "a.jsonl", corpus / "b.jsonl")
    computed.clear()
    second, _ = prepare(corpus / "c.jsonl", corpus / "b.jsonl", corpus / "a.jsonl")
    assert sorted(computed) == ALL[4:]
    assert second["features"][2:] == first["features"][2:] + first["features"][:2]


def test_patterns_and_the_archives_they_name_share_a_cache(prepare, computed, write_tar, samples):
    names = []
    for number in (0, 2, 4):
        members = [
            member
            for stem, audio, text in samples[number : number + 2]
            for member in ((f"{stem}.wav", audio), (f"{stem}.txt", text.encode()))
        ]
        names.append(write_tar(members, f"s{number}.tar"))
    prepare(names[0].parent / "s*.tar")
    computed.clear()
    rows, _ = prepare(*names)
    assert computed == [] and len(rows) == 6


def test_reloaded_processor_uses_the_same_cache(prepare, computed, tiny_model):
    prepare()
    computed.clear()
    extractor = SpeechLLMProcessor.from_pretrained(tiny_model).feature_extractor
    extractor.fbank(np.zeros(16000, np.float32))
    prepare(feature_extractor=extractor)
    assert computed == []


def test_changed_recording_is_computed_again(prepare, computed, corpus):
    before, _ = prepare()
    computed.clear()
    path = corpus / "utt03.wav"
    status = path.stat()
    samples, rate = soundfile.read(path)
    soundfile.write(path, samples[::-1], rate, subtype="PCM_16")  # the same size
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    after, _ = prepare()
    assert "utt03.wav" in computed
    assert after[3]["features"] != before[3]["features"]
    assert after[2]["features"] == before[2]["features"]


def test_changed_jsonl_is_read_again(prepare, edit):
    prepare()
    edit([2], lambda row: row["messages"][2].update(content="anders"))
    rows, _ = prepare()
    assert json.loads(rows[1]["messages"])[2]["content"] == "anders"


def test_correction_of_equal_size_is_read(prepare, edit):
    path = edit([2], lambda row: row["messages"][2].update(content="zwei"))
    prepare()
    status = path.stat()
    edit([2], lambda row: row["messages"][2].update(content="drei"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert path.stat().st_size == status.st_size
    assert json.loads(prepare()[0][1]["messages"])[2]["content"] == "drei"


@pytest.mark.parametrize(
    "extractor",
    [
        FbankFeatureExtractor(window_type="povey"),
        FbankFeatureExtractor(waveform_scale=1.0),
        FbankFeatureExtractor(frame_shift=20),
    ],
    ids=["window", "scale", "shift"],
)
def test_changed_feature_extractor_computes_all_again(prepare, computed, extractor):
    before, _ = prepare()
    computed.clear()
    after, _ = prepare(feature_extractor=extractor)
    assert sorted(computed) == ALL
    assert after[0]["features"] != before[0]["features"]


def test_changed_dtype_computes_all_again(prepare, computed):
    half, _ = prepare(feature_cache="float16")
    computed.clear()
    full, _ = prepare(feature_cache="float32")
    assert sorted(computed) == ALL
    assert len(full[0]["features"][0]) == 2 * len(half[0]["features"][0])


def test_fingerprint_contains_the_import_path_of_release_0_1():
    """Otherwise caches of release 0.1 would be computed again."""
    assert b"hf_speechllm.features" in pickle.dumps(FbankFeatureExtractor)


def test_new_features_version_computes_all_again(processor):
    from datasets.fingerprint import Hasher

    mapper = FeatureMapper(processor.feature_extractor, "float16")
    assert Hasher.hash(mapper) == Hasher.hash(FeatureMapper(processor.feature_extractor, "float16"))
    assert Hasher.hash(mapper) != Hasher.hash(replace(mapper, version=mapper.version + 1))


def test_stored_and_computed_features_give_the_same_batches(prepare, processor):
    batches = {}
    for kind in ("float32", "float16", "off"):
        rows, _ = prepare(feature_cache=kind)
        batches[kind] = SpeechLLMCollator(processor)([rows[index] for index in range(6)])
    for key, expected in batches["off"].items():
        torch.testing.assert_close(batches["float32"][key], expected, rtol=0, atol=0)
        if key == "input_features":
            # Log-mel energies are below 32: the error of half precision is at most 2^-7.
            assert (batches["float16"][key] - expected).abs().max() <= 2**-7
            assert not torch.equal(batches["float16"][key], expected)
        else:
            torch.testing.assert_close(batches["float16"][key], expected, rtol=0, atol=0)


def test_collated_batch_equals_the_processor_output(prepare, processor):
    rows, _ = prepare(feature_cache="float32")
    batch = SpeechLLMCollator(processor)([rows[index] for index in range(6)])
    expected = processor.apply_chat_template([json.loads(row["messages"]) for row in rows])
    assert torch.equal(batch.pop("positions")["labels"], label_positions(expected["labels"]))
    assert batch.keys() == expected.keys()
    for key in batch:
        assert torch.equal(batch[key], expected[key]), key


def test_unsupervised_rows_have_no_labels(prepare, processor):
    rows, _ = prepare()
    collator = SpeechLLMCollator(processor)
    batch = collator([{**rows[0], "supervised": True}, {**rows[1], "supervised": False}])
    assert (batch["labels"][0] != -100).any()
    assert (batch["labels"][1] == -100).all()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["float16", "off"])
def test_several_processes_return_the_same_rows_as_one(prepare, kind, tmp_path):
    """Includes the case that torch has used several threads before the fork, where a forked process could hang."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        FbankFeatureExtractor().fbank(np.zeros(160_000, np.float32))
        alone, _ = prepare(feature_cache=kind)
        shutil.rmtree(tmp_path / "cache")
        together, _ = prepare(feature_cache=kind, preprocessing_num_workers=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert together.to_dict() == alone.to_dict()


@pytest.mark.parametrize("kind", ["float16", "off"])
def test_more_processes_than_rows_are_accepted(prepare, kind):
    assert len(prepare(feature_cache=kind, preprocessing_num_workers=9)[0]) == 6


def spoil(corpus):
    """Damages recordings; returns line, file and reason of each."""
    (corpus / "utt01.wav").unlink()
    (corpus / "utt02.wav").write_bytes(b"")
    (corpus / "utt03.wav").write_text("no audio at all")
    soundfile.write(corpus / "utt04.wav", np.zeros(399), 16000)
    data = (corpus / "utt05.wav").read_bytes()
    (corpus / "utt05.wav").write_bytes(data[: len(data) // 2])
    return {2: "no such file", 3: "empty", 4: "not audio", 5: "25 ms", 6: "truncated"}


def test_missing_and_empty_recordings_are_reported_even_with_known_lengths(prepare, corpus):
    (corpus / "utt01.wav").unlink()
    (corpus / "utt02.wav").write_bytes(b"")
    with pytest.raises(BadDataError, match="2 of 6 rows are bad") as error:
        prepare(feature_cache="off")
    assert f"train.jsonl:2: {corpus / 'utt01.wav'}: cannot be read: No such file" in str(error.value)
    assert f"train.jsonl:3: {corpus / 'utt02.wav'}: the file is empty" in str(error.value)


@pytest.mark.parametrize("kind", ["float16", "off"])
def test_bad_recordings_are_reported_with_line_path_and_reason(prepare, corpus, edit, kind):
    edit(range(1, 7), lambda row: row.pop("speech_length"))
    reasons = spoil(corpus)
    with pytest.raises(BadDataError) as error:
        prepare(feature_cache=kind)
    message = str(error.value)
    assert "5 of 6 rows are bad" in message
    for line, reason in reasons.items():
        reported = next(text for text in message.splitlines() if f"train.jsonl:{line}: " in text)
        assert str(corpus / f"utt0{line - 1}.wav") in reported and reason in reported


def test_allowed_share_of_bad_rows_is_skipped_with_a_warning(prepare, corpus, caplog):
    spoil(corpus)
    with caplog.at_level(logging.WARNING):
        rows, _ = prepare(max_bad_fraction=0.84)
    assert rows["line"] == [1]
    assert "train.jsonl:2: " in caplog.text and "skipped" in caplog.text
    with pytest.raises(BadDataError, match="allows 83.00%"):
        prepare(max_bad_fraction=0.83)


def test_bad_dialogues_and_bad_recordings_count_together(prepare, corpus, edit):
    edit([1], lambda row: row["messages"][2].update(content=" "))
    (corpus / "utt05.wav").unlink()
    with pytest.raises(BadDataError, match="2 of 6 rows are bad") as error:
        prepare(max_bad_fraction=0.2)
    assert "train.jsonl:1: " in str(error.value) and "train.jsonl:6: " in str(error.value)
    assert prepare(max_bad_fraction=0.4)[0]["line"] == [2, 3, 4, 5]


def test_fixed_row_is_read_again(prepare, corpus, edit):
    content = json.loads((corpus / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])["messages"][2]
    edit([1], lambda row: row["messages"][2].update(content=""))
    with pytest.raises(BadDataError):
        prepare()
    edit([1], lambda row: row["messages"][2].update(content))
    assert len(prepare()[0]) == 6


def test_fixed_recording_is_read_again(prepare, corpus):
    saved = (corpus / "utt02.wav").read_bytes()
    (corpus / "utt02.wav").unlink()
    with pytest.raises(BadDataError):
        prepare()
    (corpus / "utt02.wav").write_bytes(saved)
    assert len(prepare()[0]) == 6


@pytest.mark.parametrize("kind", ["float16", "off"])
def test_recording_too_long_for_the_encoder_is_reported_with_length_and_limit(prepare, corpus, kind, edit):
    soundfile.write(corpus / "utt02.wav", np.zeros(16000 * 3), 16000)
    edit([3], lambda row: row.update(speech_length=298))
    with pytest.raises(BadDataError) as error:
        prepare(limit=40, feature_cache=kind)  # 40 encoder frames of 60 ms
    reported = [line for line in str(error.value).splitlines() if "train.jsonl:" in line]
    assert len(reported) == 1
    assert "train.jsonl:3: recording of 3.0 s; the encoder accepts at most 2.4 s" in reported[0]


@pytest.mark.parametrize("kind", ["float16", "off"])
def test_recording_too_long_for_the_budget_is_reported_with_length_and_limit(prepare, corpus, kind, edit):
    soundfile.write(corpus / "utt02.wav", np.zeros(16000 * 3), 16000)
    edit([3], lambda row: row.update(speech_length=298))
    with pytest.raises(BadDataError, match=r"train.jsonl:3: 3.0 s of audio; the batch budget is 2 s") as error:
        prepare(per_device_train_batch_seconds=2.0, feature_cache=kind)
    assert "--per_device_train_batch_seconds" in str(error.value)


@pytest.mark.parametrize("length", [None, 148])
def test_encoder_limit_is_per_recording_and_budget_is_per_dialogue(prepare, edit, corpus, length):
    """Two turns of 1.5 s each fit an encoder of 2.4 s, but not a batch of 2.5 s."""
    soundfile.write(corpus / "utt00.wav", np.zeros(24000), 16000)

    def double(row):
        row["messages"] += row["messages"][1:]
        row["speech_length"] = length

    edit([1], double)
    rows, _ = prepare(limit=40, per_device_train_batch_seconds=5.0, feature_cache="off")
    assert rows["num_frames"][0] == [148, 148]
    assert prepare(limit=40, per_device_train_batch_seconds=5.0)[0]["num_frames"][0] == [148, 148]
    with pytest.raises(BadDataError, match=r"train.jsonl:1: 3.0 s of audio"):
        prepare(limit=40, per_device_train_batch_seconds=2.5)


@pytest.mark.parametrize("kind", ["float16", "off"])
def test_missing_speech_length_is_computed_and_logged(prepare, edit, caplog, kind):
    expected = prepare(feature_cache=kind)[0]["speech_length"]
    edit([2, 5], lambda row: row.pop("speech_length"))
    with caplog.at_level(logging.INFO):
        rows, _ = prepare(feature_cache=kind)
    assert "2 of 6 rows lack speech_length" in caplog.text
    assert row_seconds(rows).tolist() == [length / 100 for length in expected]


def test_several_files_with_weights(prepare, edit, corpus):
    shutil.copy(corpus / "train.jsonl", corpus / "more.jsonl")
    lines = (corpus / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (corpus / "few.jsonl").write_text("".join(lines[:2]), encoding="utf-8")
    rows, weights = prepare(corpus / "few.jsonl", corpus / "train.jsonl", weights=[2.0, 0.5])
    assert [Path(file).name for file in rows["file"]] == ["few.jsonl"] * 2 + ["train.jsonl"] * 6
    assert weights.tolist() == [2.0] * 2 + [0.5] * 6


def test_weights_follow_their_rows_if_rows_are_skipped(prepare, corpus):
    shutil.copy(corpus / "train.jsonl", corpus / "more.jsonl")
    (corpus / "utt01.wav").unlink()
    rows, weights = prepare(corpus / "train.jsonl", corpus / "more.jsonl", weights=[3.0, 1.0], max_bad_fraction=0.2)
    assert rows["line"] == [1, 3, 4, 5, 6] * 2
    assert weights.tolist() == [3.0] * 5 + [1.0] * 5


def test_missing_file_and_file_without_rows_are_errors(prepare, corpus):
    with pytest.raises(FileNotFoundError, match="none.jsonl"):
        prepare(corpus / "none.jsonl")
    (corpus / "empty.jsonl").write_text("\n")
    with pytest.raises(BadDataError, match="empty.jsonl:1: no rows: the file is empty"):
        prepare(corpus / "train.jsonl", corpus / "empty.jsonl")
    with pytest.raises(BadDataError, match="empty.jsonl: no usable rows"):
        prepare(corpus / "empty.jsonl", max_bad_fraction=1.0)


def test_files_of_a_glob_share_one_weight(prepare, corpus):
    lines = (corpus / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, part in (("part-b.jsonl", lines[2:4]), ("part-a.jsonl", lines[:2]), ("other.jsonl", lines[4:])):
        (corpus / name).write_text("".join(part), encoding="utf-8")
    rows, weights = prepare(corpus / "part-*.jsonl", corpus / "other.jsonl", weights=[2.0, 1.0])
    assert [Path(file).name for file in rows["file"]][::2] == ["part-a.jsonl", "part-b.jsonl", "other.jsonl"]
    assert weights.tolist() == [2.0] * 4 + [1.0] * 2
    with pytest.raises(FileNotFoundError, match=r"none\*: no such file"):
        prepare(corpus / "none*")


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("cache", ["float32", "off"])
def test_rows_of_archives_equal_those_of_files(prepare, processor, write_tar, write_parquet, samples, kind, cache):
    if kind == "tar":
        path = write_tar(
            [(f"{n}.{e}", d) for n, wav, text in samples[:6] for e, d in (("wav", wav), ("txt", text.encode()))]
        )
    else:
        path = write_parquet([{"audio": {"bytes": wav, "path": n}, "sentence": text} for n, wav, text in samples[:6]])
    files, _ = prepare(feature_cache=cache)
    rows, _ = prepare(path, feature_cache=cache, preprocessing_num_workers=2)
    collator = SpeechLLMCollator(processor)
    expected, batch = (collator([found[index] for index in range(6)]) for found in (files, rows))
    for key in expected:
        torch.testing.assert_close(batch[key], expected[key], rtol=0, atol=0)


def test_changed_archive_is_read_again(prepare, computed, write_tar, samples):
    def write(end):
        return write_tar(
            [(f"{n}.{e}", d) for n, wav, text in samples[:end] for e, d in (("wav", wav), ("txt", text.encode()))]
        )

    path = write(3)
    assert len(prepare(path)[0]) == 3
    computed.clear()
    assert len(prepare(path)[0]) == 3 and computed == []
    assert len(prepare(write(5))[0]) == 5


def test_bad_sample_of_an_archive_is_reported_with_its_key(prepare, write_tar, samples):
    name, wav, _ = samples[0]
    path = write_tar([("x.wav", wav), ("y.wav", b"no sound"), ("y.txt", b"two")])
    with pytest.raises(BadDataError) as error:
        prepare(path)
    assert "shard.tar:1: x: no transcript" in str(error.value)
    with pytest.raises(BadDataError, match=r"shard.tar::y.wav@\d+\+8: not audio"):
        prepare(path, max_bad_fraction=0.5)


def test_recordings_outside_the_root_are_bad(prepare, corpus, edit, make_wav):
    outside = make_wav("outside.wav")
    edit([2], lambda row: row["messages"][1].update(content=f"x<|startofspeech|>!{outside}<|endofspeech|>"))
    (corpus / "utt03.wav").unlink()
    (corpus / "utt03.wav").symlink_to(outside)
    with pytest.raises(BadDataError) as error:
        prepare(audio_root=str(corpus))
    assert "2 of 6 rows are bad" in str(error.value)
    assert f"train.jsonl:2: {outside}: outside --audio_root {corpus}" in str(error.value)
    assert f"train.jsonl:4: {corpus / 'utt03.wav'}: outside --audio_root" in str(error.value)
    assert len(prepare()[0]) == 6


def test_augmentation_depends_only_on_the_seed_of_the_row(prepare, processor):
    rows, _ = prepare()
    collator = SpeechLLMCollator(processor, augmentations(tempo_perturb=0.1, spec_augment=True))
    first = collator([{**rows[0], "seed": (0, 0)}, {**rows[1], "seed": (0, 1)}])
    alone = collator([{**rows[1], "seed": (0, 1)}])
    frames = int(alone["input_features_mask"].sum())
    assert torch.equal(first["input_features"][1, :frames], alone["input_features"][0])
    other = collator([{**rows[1], "seed": (0, 7)}])
    assert other["input_features"].shape != alone["input_features"].shape or not torch.equal(
        other["input_features"], alone["input_features"]
    )


def test_masks_have_bounded_width_and_do_not_change_the_input():
    features = torch.randn(200, 80)
    original = features.clone()
    augment = SpecAugment(
        num_frequency_masks=1, frequency_width=10, num_time_masks=1, time_width=30, time_fraction=0.1
    )
    widths = []
    for seed in range(100):
        masked = augment(features, np.random.default_rng(seed)) != features
        columns, lines = masked.all(0), masked.all(1)
        widths.append((int(columns.sum()), int(lines.sum())))
        assert torch.equal(masked, columns[None, :] | lines[:, None])
    assert torch.equal(features, original)
    assert max(width for width, _ in widths) == 10
    assert max(width for _, width in widths) == 20


def test_masks_are_by_default_two_stripes_of_either_kind():
    """Stripes that overlap or are empty count less; in many draws, all are apart."""
    features = torch.randn(1000, 80)
    stripes, ends = [], set()
    for seed in range(300):
        masked = SpecAugment()(features, np.random.default_rng(seed)) != features
        ends |= {(0, index) for index in (0, -1) if masked.all(0)[index]}
        short = SpecAugment(num_frequency_masks=0)(features[:10], np.random.default_rng(seed)) != features[:10]
        ends |= {(1, index) for index in (0, -1) if short.all(1)[index]}
        lines = [torch.nn.functional.pad(masked.all(axis).int(), (1, 1)) for axis in (0, 1)]
        stripes.append([int((line.diff() == 1).sum()) for line in lines])
        assert lines[0].sum() <= 40 and lines[1].sum() <= 60
    assert ends == {(axis, index) for axis in (0, 1) for index in (0, -1)}  # anywhere, also at the ends
    assert max(columns for columns, _ in stripes) == max(times for _, times in stripes) == 2


def test_tempo_is_changed_within_its_spread_and_the_spectrum_is_kept():
    features = torch.sin(torch.linspace(0, 6, 300)).unsqueeze(1) + torch.arange(80.0)
    lengths = []
    for seed in range(100):
        stretched = TempoPerturb(0.1)(features, np.random.default_rng(seed))
        lengths.append(len(stretched))
        expected = torch.sin(torch.linspace(0, 6, len(stretched))).unsqueeze(1) + torch.arange(80.0)
        assert (stretched - expected).abs().max() < 0.02
    assert 270 <= min(lengths) < 275 and 325 < max(lengths) <= 330


def test_paths_are_relative_to_the_link_of_a_list(prepare, corpus, tmp_path):
    """Decoding and streaming use the same rule."""
    (tmp_path / "elsewhere").mkdir()
    (corpus / "train.jsonl").rename(tmp_path / "elsewhere" / "train.jsonl")
    (corpus / "train.jsonl").symlink_to(tmp_path / "elsewhere" / "train.jsonl")
    rows, _ = prepare()
    assert rows["recordings"][0] == [str(corpus / "utt00.wav")]
