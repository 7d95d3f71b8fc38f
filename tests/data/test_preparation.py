import multiprocessing
import os
import signal

import pytest

from hf_speechllm.audio.waveform import AudioError
from hf_speechllm.data import preparation
from hf_speechllm.data.kaldi import Utterance
from hf_speechllm.data.preparation import RowMaker, prepare

NUM_UTTERANCES = 300


class Tokenizer:
    """A tokenizer with one token per character."""

    def __call__(self, texts, **options):
        return {"input_ids": [list(text) for text in texts]}


@pytest.fixture
def utterances(make_wav, tmp_path):
    """Utterances: every 7th recording is missing, every 11th is not audio, every 13th transcript is unusable."""
    (tmp_path / "words.wav").write_text("words\n" * 100)
    recordings = [str(make_wav(f"{number}.wav", seconds=0.1 + 0.05 * number)) for number in range(5)]
    result = []
    for number in range(NUM_UTTERANCES):
        recording = recordings[number % 5]
        if number % 7 == 0:
            recording = f"{tmp_path}/none{number}.wav"
        elif number % 11 == 0:
            recording = f"{tmp_path}/words.wav"
        text = "<|im_end|>" if number % 13 == 0 else f"text {number}"
        result.append(Utterance(f"id{number}", recording, text, number + 1, 1000 - number, "wav.scp", "text"))
    return result


@pytest.fixture
def processes(monkeypatch):
    """Enables processes for lists with at least one utterance per process."""
    monkeypatch.setattr(preparation, "NUM_PER_PROCESS", 1)


def maker(**options):
    return RowMaker("Write:", Tokenizer(), **options)


def joined(parts):
    lines, seconds, bad, num_tokens = [], [], [], 0
    for part in parts:
        lines += part.lines
        seconds += part.seconds
        bad += part.bad
        num_tokens += part.num_tokens
    return lines, seconds, num_tokens, bad


def measured_elsewhere(utterance):
    return AudioError(f"process {os.getpid()}")


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_processes_and_threads_return_the_same_results_in_the_same_order(utterances, tmp_path, request, num_workers):
    threads = joined(prepare(utterances, maker(folder=str(tmp_path / "a")), 8))
    request.getfixturevalue("processes")
    assert joined(prepare(utterances, maker(folder=str(tmp_path / "a")), num_workers)) == threads
    lines, seconds, num_tokens, bad = threads
    assert len(lines) == len(seconds) > 200 and len(lines) + len(bad) == NUM_UTTERANCES
    assert "!../1.wav<" in lines[0] and '"text_length": 6' in lines[0] and lines[0].endswith("}\n")
    assert num_tokens > 6 * len(lines)
    assert [kind.partition(":")[0] for _, _, kind in bad[:2]] == ["unusable transcript", "unusable recording"]
    lines_of_lists = [line if file == "wav.scp" else 1001 - line for file, line, _ in bad]
    assert lines_of_lists == sorted(lines_of_lists)


def test_only_long_lists_use_processes(utterances, request, monkeypatch):
    monkeypatch.setattr(preparation, "measure", measured_elsewhere)
    good = [utterance for utterance in utterances if utterance.transcript.startswith("text")]
    here = f"unusable recording: process {os.getpid()}"
    assert {reason for *_, reason in joined(prepare(good, maker(), 8))[-1]} == {here}
    request.getfixturevalue("processes")
    reasons = {reason for *_, reason in joined(prepare(good, maker(), 3))[-1]}
    assert here not in reasons and 1 <= len(reasons) <= 3


def test_read_ahead_of_all_files_precedes_the_first_measurement(utterances, processes, monkeypatch):
    asked = []
    monkeypatch.setattr(preparation, "read_ahead", asked.extend)
    monkeypatch.setattr(preparation, "measure", lambda utterance: AudioError(f"{len(asked)} asked for"))
    reason = next(prepare(utterances[1:], maker(), 1)).bad[0][-1]
    assert reason == f"unusable recording: {(NUM_UTTERANCES - 1) // 16} asked for"


def test_killed_process_is_an_error(utterances, processes, monkeypatch):
    def die(utterance):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(preparation, "measure", die)
    with pytest.raises(ChildProcessError, match="was killed"):
        list(prepare(utterances, maker(), 2))
    assert not multiprocessing.active_children()


def test_processes_end_if_the_generator_is_closed(utterances, processes):
    other = multiprocessing.get_context("fork").Process(target=signal.pause)
    other.start()
    try:
        parts = prepare(utterances, maker(), 2)
        next(parts)
        assert len(multiprocessing.active_children()) == 3
        parts.close()
        assert multiprocessing.active_children() == [other]
    finally:
        other.kill()
        other.join()
