"""`hf-speechllm prepare`: output files, summary and errors; training and decoding with the output."""

import json
import shutil

import numpy as np
import pytest
import soundfile

from hf_speechllm.data.bad_rows import BadDataError
from hf_speechllm.data.dataset import prepare_rows
from hf_speechllm.data.options import DataOptions
from hf_speechllm.data.row_files import foreign_format, generator_arguments, require_row_file
from hf_speechllm.locks import output_file_lock
from hf_speechllm.model.processing import SpeechLLMProcessor

RATE = 16000


@pytest.fixture
def kaldi(tmp_path):
    """Returns a Kaldi folder: 6 recordings of 3 s, each with two segments of one speaker."""
    folder = tmp_path / "kaldi"
    folder.mkdir()
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (6, 3 * RATE)).astype(np.float32)
    lists = {"wav.scp": "", "text": "", "segments": "", "utt2spk": ""}
    for number, samples in enumerate(noise):
        soundfile.write(folder / f"r{number}.flac", samples, RATE)
        lists["wav.scp"] += f"r{number} r{number}.flac\n"
        for part in (0, 1):
            id_ = f"s{number}-{part}"
            lists["text"] += f"{id_} one two\n"
            lists["segments"] += f"{id_} r{number} {1.5 * part} {1.5 * part + 1.25}\n"
            lists["utt2spk"] += f"{id_} s{number}\n"
    for name, content in lists.items():
        (folder / name).write_text(content)
    return folder


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def recordings(path):
    return [row["messages"][1]["content"].partition("!")[2].partition("<|")[0] for row in rows_of(path)]


def test_files_and_summary(run, kaldi, tmp_path, tiny_model):
    out = tmp_path / "out"
    options = ["--output_dir", out, "--split", 0.5, 0.333, 0.167, "--model_name_or_path", tiny_model, "--relative"]
    code, output = run("prepare", kaldi, *options)
    assert code is None, code
    paths = {name: recordings(out / f"{name}.jsonl") for name in ("train", "dev", "test")}
    assert {name: len(found) for name, found in paths.items()} == {"train": 6, "dev": 4, "test": 2}
    files = {name: {path.partition("#")[0] for path in found} for name, found in paths.items()}
    assert (
        not files["train"] & files["dev"] and not files["train"] & files["test"] and not files["dev"] & files["test"]
    )
    assert paths["train"][0].startswith("../kaldi/r") and "#t=0,1.25" in paths["train"][0]
    row = rows_of(out / "train.jsonl")[0]
    assert row["speech_length"] == 123 and row["text_length"] > 0 and row["messages"][2]["content"] == "one two"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["format"] == "kaldi" and summary["split"] == "drawn by speaker, seed 0" and not summary["bad_rows"]
    assert summary["splits"]["train"]["speakers"] == 3 and summary["splits"]["train"]["hours"] == 0.0021
    assert "train      6 rows, 0.0021 hours, 3 speakers" in output.out and "languages  unknown 12" in output.out


def test_second_run_writes_the_same_files_and_requires_overwrite(run, kaldi, tmp_path):
    out = tmp_path / "out"
    assert run("prepare", kaldi, "--output_dir", out)[0] is None
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code, output = run("prepare", kaldi, "--output_dir", out)
    assert code == 1 and "train.jsonl exists; choose another --output_dir, or use --overwrite" in output.err
    assert run("prepare", kaldi, "--output_dir", out, "--overwrite")[0] is None
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run("prepare", kaldi, "--output_dir", out, "--overwrite", "--split", 1, 0, 0)[0] is None
    assert sorted(path.name for path in out.iterdir()) == ["summary.json", "train.jsonl"]


def test_no_output_is_written_with_too_many_bad_rows(run, kaldi, tmp_path):
    with open(kaldi / "segments", "a") as file:
        file.write("s0-2 r0 2 4\n")
    with open(kaldi / "text", "a") as file:
        file.write("s0-2 outside\ns9-9 nowhere\n")
    code, _ = run("prepare", kaldi, "--output_dir", tmp_path / "out")
    assert f"{kaldi}/segments:13: unusable recording: {kaldi}/r0.flac#t=2,4: outside the recording" in code
    assert f'{kaldi}/text:14: ID in one list only: "s9-9"' in code and "2 of 14 rows are bad" in code
    assert not (tmp_path / "out").exists()
    assert run("prepare", kaldi, "--output_dir", tmp_path / "out", "--max_bad_fraction", 0.2)[0] is None
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["bad_rows"] == 2 and set(summary["bad_kinds"]) == {"ID in one list only", "unusable recording"}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--format", "cassette"], "--format cassette: unknown format; choose one of kaldi"),
        (["--columns", "voice=a"], "--columns voice=...: unknown role; choose one of audio"),
        (["--audio_root", "/proc"], "outside --audio_root"),
        (["--language", "xx"], "unknown language"),
        (["--format", "librispeech"], "no usable rows; check the source, --format and"),
    ],
)
def test_wrong_options_are_reported(run, kaldi, tmp_path, options, message):
    code, _ = run("prepare", kaldi, "--output_dir", tmp_path / "out", *options)
    assert message in code


def test_prompts_name_the_language_of_the_source(run, kaldi, tmp_path):
    ids = [line.split()[0] for line in (kaldi / "text").read_text().splitlines()]
    (kaldi / "utt2lang").write_text("".join(f"{id_} {'en' if id_ < 's3' else 'zh'}\n" for id_ in ids))
    options = ["--split", 1, 0, 0, "--language", "source"]
    assert run("prepare", kaldi, "--output_dir", tmp_path / "out", *options)[0] is None
    prompts = [row["messages"][1]["content"].partition("：")[0] for row in rows_of(tmp_path / "out/train.jsonl")]
    assert prompts == ["语音转写成英文"] * 6 + ["语音转写成中文"] * 6


def test_training_reads_sources_directly(kaldi, tmp_path, tiny_model):
    for split in ("train", "dev", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / split).mkdir()
        for path in kaldi.iterdir():
            (tmp_path / "data" / split / path.name).write_bytes(path.read_bytes())
    processor = SpeechLLMProcessor.from_pretrained(tiny_model)
    options = DataOptions(cache_dir=str(tmp_path / "cache"), preprocessing_num_workers=1)

    def load(*sources, **others):
        return prepare_rows([str(source) for source in sources], processor, 2048, options, **others)

    rows, _ = load(kaldi)
    assert len(rows) == 12 and rows[0]["recordings"] == [f"{kaldi}/r0.flac#t=0,1.25"]
    assert [sum(frames) for frames in rows["num_frames"]] == [123] * 12
    for split in ("train", "dev"):
        rows, _ = load(tmp_path / "data", split=split)
        assert len(rows) == 12 and all(f"/{split}/" in paths[0] for paths in rows["recordings"])
    _, weights = load(kaldi, tmp_path / "data", weights=[1.0, 2.0])
    assert weights.tolist() == [1.0] * 12 + [2.0] * 12
    before = generator_arguments(kaldi, "train")
    (kaldi / "text").write_text((kaldi / "text").read_text().replace("one", "five"))
    assert generator_arguments(kaldi, "train")["stamp"] != before["stamp"]
    (kaldi / "segments").write_text((kaldi / "segments").read_text().replace("1.25", "0"))
    with pytest.raises(BadDataError, match=r"segments:1: bad segment"):
        load(kaldi)


def test_sources_that_must_be_prepared_name_the_command(kaldi, tmp_path):
    with pytest.raises(
        BadDataError, match="format kaldi; --streaming .* use `hf-speechllm prepare .*kaldi --output_dir"
    ):
        require_row_file(str(kaldi))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadDataError, match="unknown layout of a folder"):
        require_row_file(str(tmp_path / "empty"))
    (tmp_path / "list.csv").write_text("clip,said\na.wav,b\n")
    with pytest.raises(
        BadDataError, match=r"--columns audio=NAME .*; use `hf-speechllm prepare .*list.csv --output_dir"
    ):
        generator_arguments(tmp_path / "list.csv", "train")


def test_prepared_source_can_be_trained_and_decoded(run, kaldi, tmp_path, tiny_model, launch):
    out = tmp_path / "out"
    assert run("prepare", kaldi, "--output_dir", out, "--split", 0.6, 0.2, 0.2)[0] is None
    code, output = run("inspect", "--model_name_or_path", tiny_model, "--jsonl_file", out / "train.jsonl")
    assert not code and "one two" in output.out
    result = launch(
        "recipes/finetune.py", "--model_name_or_path", tiny_model, "--train_file", kaldi,
        "--validation_file", out / "dev.jsonl", "--output_dir", tmp_path / "run", "--max_steps", 1,
        "--per_device_train_batch_seconds", 20, "--cache_dir", tmp_path / "cache", "--preprocessing_num_workers", 1,
        "--dataloader_num_workers", 0, "--report_to", "none", "--use_cpu", "true",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    assert "kaldi, 12 rows" in result.stderr
    decoding = ["decode", "--model_name_or_path", tmp_path / "run", "--max_new_tokens", 4, "--output_file"]
    assert not run(*decoding, tmp_path / "hyp.txt", "--jsonl_file", out / "test.jsonl")[0]
    ids = [line.partition("\t")[0] for line in (tmp_path / "hyp.txt").read_text().splitlines()]
    assert ids == [row["key"] for row in rows_of(out / "test.jsonl")]
    lists = ["--scp_file", kaldi / "wav.scp", "--segments_file", kaldi / "segments"]
    assert not run(*decoding, tmp_path / "hyp2.txt", *lists)[0]
    ids = [line.partition("\t")[0] for line in (tmp_path / "hyp2.txt").read_text().splitlines()]
    assert ids == [line.split()[0] for line in (kaldi / "segments").read_text().splitlines()]


def test_two_runs_into_one_folder_are_not_mixed(run, kaldi, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    with output_file_lock(out / "summary.json", "out", "--output_dir"):
        code, _ = run("prepare", kaldi, "--output_dir", out)
    assert "in use by another run" in code and not list(out.glob("*.jsonl"))
    (out / "train.jsonl").touch()
    answers = iter([None, "it exists"])  # the other run ends between both questions
    monkeypatch.setattr("hf_speechllm.cli.prepare.existing_output", lambda args: next(answers))
    assert "it exists" in run("prepare", kaldi, "--output_dir", out)[0]
    assert not (out / "train.jsonl").read_text()


@pytest.mark.parametrize("shares", [(0.8, 0.1, 0), (0.5, 0.5, 0.5), (0, 0, 0)])
def test_shares_that_do_not_sum_to_one_are_refused(run, kaldi, tmp_path, shares):
    code, output = run("prepare", kaldi, "--output_dir", tmp_path / "out", "--split", *shares)
    assert code == 2 and f"the sum of the shares is {sum(shares):g}; it must be 1" in output.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["train.jsonl", "link.jsonl", ""])
def test_a_source_is_not_replaced_by_its_own_split(run, tmp_path, source):
    (tmp_path / "train.jsonl").write_text("{}")
    (tmp_path / "link.jsonl").symlink_to("train.jsonl")
    code, written = run("prepare", tmp_path / source, "--output_dir", tmp_path, "--overwrite")
    assert code == 2 and "train.jsonl is an input of this command" in written.err
    assert (tmp_path / "train.jsonl").read_text() == "{}"


@pytest.mark.parametrize("option", ["--scp_file", "--jsonl_file"])
def test_lists_are_not_replaced_by_what_is_made_of_them(run, kaldi, option):
    before = (kaldi / "wav.scp").read_text()
    model = ["--model_name_or_path", "none"]
    assert run("decode", *model, option, kaldi / "wav.scp", "--output_file", kaldi / "wav.scp", "--overwrite")[0] == 2
    lists = ["--scp_file", kaldi / "wav.scp", "--transcript_file", kaldi / "text"]
    assert run("scp2jsonl", *lists, "--jsonl_file", kaldi / "wav.scp", "--overwrite")[0] == 2
    assert (kaldi / "wav.scp").read_text() == before


def test_an_empty_split_names_the_remedy(run, kaldi, tmp_path, caplog):
    (kaldi / "utt2spk").unlink()
    for name in ("text", "segments"):
        (kaldi / name).write_text("".join((kaldi / name).read_text().splitlines(True)[:2]))
    code, output = run("prepare", kaldi, "--output_dir", tmp_path / "out")
    assert code is None and "test is empty" in caplog.text and "choose other shares with --split" in caplog.text
    assert f"hf-speechllm doctor {tmp_path}/out" in output.out and "test.jsonl" not in output.out


@pytest.mark.parametrize(("speakers", "options"), [(1, []), (2, []), (2, ["--split", "0.5", "0", "0.5"])])
def test_recordings_are_divided_if_there_are_fewer_speakers_than_splits(
    run, kaldi, tmp_path, caplog, speakers, options
):
    (kaldi / "utt2spk").write_text("".join(f"s{i}-{part} me{i % speakers}\n" for i in range(6) for part in (0, 1)))
    code, output = run("prepare", kaldi, "--output_dir", tmp_path / "out", *options)
    assert code is None and "is empty" not in caplog.text
    assert ("not those of new speakers" in caplog.text) == (not options)
    assert f"drawn by {'speaker' if options else 'recording'}, seed 0" in output.out
    names = ["train", "test"] if options else ["train", "dev", "test"]
    found = [{path.partition("#")[0] for path in recordings(tmp_path / "out" / f"{name}.jsonl")} for name in names]
    assert all(found) and sum(map(len, found)) == len(set.union(*found)) == 6


def test_rows_that_share_a_whole_recording_are_reported(run, tmp_path, make_wav, caplog):
    path = make_wav(seconds=2)
    for number, header in enumerate(("audio,start_ms,end_ms,text", "audio,start,end,text")):
        (tmp_path / "a.csv").write_text(f"{header}\n{path},0,1,one\n{path},1,2,two\n")
        caplog.clear()
        run("prepare", tmp_path / "a.csv", "--output_dir", tmp_path / f"out{number}")
        assert ("--columns start=NAME end=NAME" in caplog.text) == (number == 0)


def test_a_folder_of_recordings_needs_a_table(run, tmp_path):
    (tmp_path / "speaker").mkdir()
    (tmp_path / "speaker" / "a.WAV").touch()
    message, _ = run("prepare", tmp_path / "speaker", "--output_dir", tmp_path / "out")
    assert "recordings, but no list of transcripts" in message and "columns audio (path) and text" in message
    with pytest.raises(BadDataError, match="recordings, but no list of transcripts"):
        foreign_format(tmp_path / "speaker")


def test_lists_of_a_folder_hide_those_of_its_split_folders(run, kaldi, tmp_path, caplog):
    shutil.copytree(kaldi, kaldi / "test")
    code, output = run("prepare", kaldi, "--output_dir", tmp_path / "out")
    assert code is None and "the lists of this folder are read, the folders test are not" in caplog.text
