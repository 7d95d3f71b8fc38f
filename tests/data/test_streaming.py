"""Streaming: every row once per pass over all ranks and workers, batch budget, exact resume, bad rows."""

import json
import logging
from collections import Counter

import pytest
import torch

from hf_speechllm.data.augmentation import SpecAugment
from hf_speechllm.data.bad_rows import BadDataError
from hf_speechllm.data.collator import SpeechLLMCollator
from hf_speechllm.data.stream_loader import StreamLoader
from hf_speechllm.data.streaming import RowStream, StreamState
from hf_speechllm.model.loss import label_positions

BUDGET = 4.0  # seconds


class Naming(SpeechLLMCollator):
    """A collator that returns rows instead of tensors."""

    def __call__(self, rows):
        return [
            {"answer": json.loads(row["messages"])[-1]["content"], "frames": row["num_frames"], "seed": row["seed"]}
            for row in rows
        ]


@pytest.fixture
def stream(processor, tiny_corpus, monkeypatch):
    """Builds a stream of the tiny corpus in blocks of about three rows."""
    monkeypatch.setattr("hf_speechllm.data.shards.BLOCK_SIZE", 1000)

    def make(*files, collator=Naming, **options):
        collator = collator if isinstance(collator, SpeechLLMCollator) else collator(processor)
        files = [str(file) for file in files] or [str(tiny_corpus.jsonl)]
        return RowStream(files, collator, BUDGET, 2048, **{"window_rows": 8, **options})

    return make


def take(stream, number, worker=0, workers=1, state=None):
    batches = stream.batches(state or StreamState(), worker, workers)
    return [next(batches) for _ in range(number)]


def passes(stream, epochs, workers=1):
    """Returns the keys of the rows of each pass, from all workers of one rank."""
    found = [Counter() for _ in range(epochs)]
    for worker in range(workers):
        for batch, state in stream.batches(StreamState(), worker, workers):
            for row in batch:
                _, epoch, shard, _, number = row["seed"]
                if epoch < epochs:
                    found[epoch][shard, number] += 1
            if state.epoch >= epochs:
                break
    return found


@pytest.mark.parametrize("ranks, workers, window", [(1, 1, 5), (2, 2, 8), (3, 1, 100)])
def test_every_row_is_used_once_per_pass_by_one_worker(stream, ranks, workers, window):
    total = [Counter(), Counter()]
    for rank in range(ranks):
        made = stream(rank=rank, num_ranks=ranks, window_rows=window)
        assert len(made.shards) >= ranks * workers
        for count, found in zip(total, passes(made, 2, workers), strict=True):
            count.update(found)
    assert [len(count) for count in total] == [24, 24]
    assert set(total[0].values()) == set(total[1].values()) == {1}


def test_more_workers_than_rows_are_an_error(stream):
    """Otherwise workers would wait forever."""
    with pytest.raises(BadDataError, match="no row for one of 100 workers"):
        for worker in range(100):
            take(stream(), 1, worker, 100)


def test_workers_share_rows_if_there_are_few_shards(stream, write_tar, samples):
    path = write_tar([pair for n, data, text in samples for pair in ((f"{n}.wav", data), (f"{n}.txt", text.encode()))])
    total = Counter()
    for rank in range(3):
        made = stream(path, rank=rank, num_ranks=3)
        assert len(made.shards) == 1
        (found,) = passes(made, 1, workers=2)
        assert sum(found.values()) == 8
        total.update(found)
    assert len(total) == 24 and set(total.values()) == {1}


def test_batches_fit_the_budget_and_have_similar_lengths(stream):
    batches = [batch for batch, _ in take(stream(window_rows=24), 30)]
    assert max(len(batch) for batch in batches) > 2
    for batch in batches:
        frames = [row["frames"] for row in batch]
        assert max(frames) * len(frames) <= 100 * BUDGET
    padded = sum(max(row["frames"] for row in batch) * len(batch) for batch in batches)
    assert sum(row["frames"] for batch in batches for row in batch) > 0.8 * padded


def test_order_depends_only_on_seed_pass_and_rank(stream):
    def seeds(**options):
        return [row["seed"][1:] for batch, _ in take(stream(**options), 20) for row in batch]

    assert seeds(seed=1) == seeds(seed=1)
    assert seeds(seed=1) != seeds(seed=2)
    first = [row for row in seeds() if row[0] == 0]
    second = [(0, *row[1:]) for row in seeds() if row[0] == 1]
    assert len(first) == 24 and first != second[:24]


@pytest.mark.parametrize("kind", ["jsonl", "tar", "parquet"])
@pytest.mark.parametrize("cut", [1, 2, 5, 11, 19])
def test_resuming_from_any_state_gives_the_same_batches(stream, write_tar, write_parquet, samples, kind, cut):
    files = ()
    if kind == "tar":
        files = [
            write_tar(
                [(f"{n}.{e}", d) for n, data, text in samples for e, d in (("wav", data), ("txt", text.encode()))]
            )
        ]
    elif kind == "parquet":
        files = [write_parquet([{"audio": data, "text": text} for _, data, text in samples])]
    whole = take(stream(*files), 20)
    rest = take(stream(*files), 20 - cut, state=whole[cut - 1][1])
    assert rest == whole[cut:]


@pytest.mark.parametrize("weight", [0.5, 2.5])
def test_weighted_stream_goes_on_with_the_rows_that_were_drawn(stream, weight):
    whole = take(stream(weights=[weight]), 20)
    for cut in (1, 2, 5, 11, 19):
        assert take(stream(weights=[weight]), 20 - cut, state=whole[cut - 1][1]) == whole[cut:]


def test_dialogue_of_several_recordings_is_as_long_as_all_of_them(stream, tmp_path, tiny_corpus):
    row = json.loads(tiny_corpus.jsonl.read_text(encoding="utf-8").splitlines()[0])
    length = row["speech_length"]
    row["messages"] += row["messages"][1:]
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (batch, _), *_ = take(stream(tmp_path / "a.jsonl"), 1)
    assert [item["frames"] for item in batch][:1] == [2 * length]


def test_weights_set_how_often_rows_are_used_in_a_pass(stream, write_tar, samples):
    made = write_tar(
        [(f"{n}.{e}", d) for n, data, text in samples for e, d in (("wav", data), ("txt", text.encode()))]
    )
    both = stream(made, weights=[2.5], window_rows=10)
    found = passes(both, 8)
    for counts in found:
        assert set(counts.values()) <= {2, 3} and len(counts) == 24
    thirds = sum(value == 3 for counts in found for value in counts.values())
    assert 0.35 < thirds / (8 * 24) < 0.65
    assert len({frozenset(key for key, value in counts.items() if value == 3) for counts in found}) > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_resumes_from_a_checkpoint(stream, tmp_path, workers):
    whole = StreamLoader(stream(), workers)
    batches = iter(whole)
    expected = []
    for number in range(17):
        if number == 9:
            whole.save(tmp_path)
        expected.append(next(batches))
    del batches
    again = StreamLoader(stream(), workers)
    again.load(tmp_path)
    assert again.batches == 9
    assert [batch for batch, _ in zip(again, range(8), strict=False)] == expected[9:]


def test_bad_rows_and_recordings_of_all_workers_are_counted(stream):
    places = [place for _, place in take(stream(window_rows=24), 20)]
    assert all((place.bad_rows, place.bad_recordings) == (0, 0) for place in places)
    assert {(place.window, place.rows) for place in places} == {(0, 0), (1, 24), (2, 48)}
    loader = StreamLoader(stream(), 2)
    assert loader.bad_rows == 0
    loader.states = [StreamState(bad_rows=3, bad_recordings=1), StreamState(bad_recordings=5)]
    assert loader.bad_rows == 9


def test_state_of_other_data_or_processes_is_refused(stream, tmp_path):
    StreamLoader(stream()).save(tmp_path)
    for other, key in (
        (StreamLoader(stream(), 2), "workers"),
        (StreamLoader(stream(num_ranks=2)), "ranks"),
        (StreamLoader(stream(window_rows=9)), "window_rows"),
        (StreamLoader(stream(weights=[2])), "weights"),
    ):
        with pytest.raises(ValueError, match=f"changed: {key} "):
            other.load(tmp_path)
    with pytest.raises(ValueError, match="stream_rank1.json is missing"):
        StreamLoader(stream(rank=1, num_ranks=2)).load(tmp_path)


def test_batches_equal_the_processor_output(stream, processor, tiny_corpus):
    names = take(stream(), 3)
    rows = {
        json.loads(line)["messages"][2]["content"] + str(json.loads(line)["speech_length"]): json.loads(line)[
            "messages"
        ]
        for line in tiny_corpus.jsonl.read_text(encoding="utf-8").splitlines()
    }
    for (batch, _), (named, _) in zip(take(stream(collator=SpeechLLMCollator), 3), names, strict=True):
        expected = processor.apply_chat_template([rows[row["answer"] + str(row["frames"])] for row in named])
        assert torch.equal(batch.pop("positions")["labels"], label_positions(expected["labels"]))
        assert batch.keys() == expected.keys()
        for key in batch:
            assert torch.equal(batch[key], expected[key]), key


def test_augmentation_differs_between_passes_but_not_after_resume(stream, processor):
    class Masked(SpeechLLMCollator):
        """Gives the features of each row with its pass and its number."""

        def __call__(self, rows):
            return [(row["seed"][1], row["seed"][2:], self.row_features(row)[0]) for row in rows]

    collator = Masked(processor, [SpecAugment()])
    whole = take(stream(collator=collator), 60)
    rest = take(stream(collator=collator), 54, state=whole[5][1])
    for (batch, _), (again, _) in zip(whole[6:], rest, strict=True):
        for (*name, features), (*other, same) in zip(batch, again, strict=True):
            assert name == other and torch.equal(features, same)
    seen = {(number, row): features for batch, _ in whole for number, row, features in batch}
    both = [row for number, row in seen if number == 1 and (0, row) in seen]
    assert len(both) > 12
    assert not any(torch.equal(seen[0, row], seen[1, row]) for row in both)


@pytest.fixture
def spoiled(tiny_corpus, tmp_path):
    """The corpus with a bad second row and a missing recording in the third row."""
    lines = tiny_corpus.jsonl.read_text(encoding="utf-8").splitlines()
    start = len(lines[0].encode()) + 1
    lines[1] = "{"
    lines[2] = lines[2].replace("utt02.wav", "gone.wav")
    path = tmp_path / "spoiled.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path, start


def test_first_bad_row_stops_the_run_by_default(stream, spoiled):
    path, start = spoiled
    with pytest.raises(BadDataError, match=rf"spoiled.jsonl:byte {start}: not JSON|gone.wav: no such file"):
        take(stream(path), 30)


def test_bad_rows_are_reported_counted_and_skipped(stream, spoiled, caplog):
    path, start = spoiled
    with caplog.at_level(logging.WARNING):
        batches = take(stream(path, max_bad_fraction=0.1), 40)
    state = batches[-1][1]
    assert state.epoch > 1
    assert abs(state.bad_rows + state.bad_recordings - state.rows / 12) < 4
    assert f"spoiled.jsonl:byte {start}: not JSON" in caplog.text
    assert "gone.wav: no such file" in caplog.text
    assert len({row["seed"][2:] for batch, _ in batches for row in batch}) == 22


def test_too_many_bad_rows_stop_the_run_after_the_minimum(stream, spoiled, monkeypatch):
    made = stream(spoiled[0], max_bad_fraction=0.05)  # 1 of 12 rows is bad
    with pytest.raises(BadDataError, match=r"of \d{3} rows that a worker read are bad.*\n.*--max_bad_fraction"):
        take(made, 10_000)
    monkeypatch.setattr("hf_speechllm.data.streaming.MIN_ROWS", 50)
    with pytest.raises(BadDataError, match=r"of [2-6]\d rows"):
        take(made, 10_000)


def test_data_without_usable_rows_are_an_error(stream, tmp_path, tiny_corpus):
    (tmp_path / "a.jsonl").write_text("{\n" * 5)
    with pytest.raises(BadDataError, match="no usable rows"):
        take(stream(tmp_path / "a.jsonl", max_bad_fraction=1), 1)
    (tmp_path / "b.jsonl").write_text(tiny_corpus.jsonl.read_text().replace(str(tiny_corpus.folder), "/gone"))
    with pytest.raises(BadDataError, match="no recording of .* rows can be decoded"):
        take(stream(tmp_path / "b.jsonl", max_bad_fraction=1), 1)
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(BadDataError, match="no row for one of 1 workers"):
        take(stream(tmp_path / "c.jsonl"), 1)


def test_too_long_recordings_and_those_outside_the_root_are_bad(stream, tiny_corpus, tmp_path):
    made = stream(max_bad_fraction=1)
    made.batch_seconds = 1.0
    assert max(row["frames"] for batch, _ in take(made, 30) for row in batch) <= 100
    assert take(made, 30)[-1][1].bad_rows > 0
    with pytest.raises(BadDataError, match="outside --audio_root"):
        take(stream(audio_root=str(tmp_path)), 1)
    assert take(stream(audio_root=str(tiny_corpus.folder)), 1)


def test_wrong_length_in_a_row_does_not_exceed_the_budget(stream, tmp_path, make_wav, tiny_corpus):
    row = json.loads(tiny_corpus.jsonl.read_text(encoding="utf-8").splitlines()[0])
    path = str(make_wav(seconds=5))
    row["messages"][1]["content"] = f"x<|startofspeech|>!{path}<|endofspeech|>"
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(BadDataError, match="5.0 s of audio; the batch budget is 4 s"):
        take(stream(tmp_path / "a.jsonl"), 1)
