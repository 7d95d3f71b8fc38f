import os

import pytest

from hf_speechllm.data.bad_rows import BadDataError
from hf_speechllm.data.corpus import choose_splits
from hf_speechllm.data.splits import own_splits, split_utterances
from hf_speechllm.data.utterance import Utterance

SHARES = (0.8, 0.1, 0.1)


def utterance(recording, speaker=None, split=None, origin=None, messages=None):
    return Utterance("", recording, "a", 1, 1, "f", "f", speaker, None, split, messages, None, origin)


@pytest.fixture
def corpus():
    """Returns 10 speakers with 5 to 14 utterances, each in a separate recording."""
    return [utterance(f"/{speaker}-{n}.wav", f"s{speaker}") for speaker in range(10) for n in range(5 + speaker)]


def test_a_speaker_is_in_one_split_and_shares_are_met(corpus):
    splits = split_utterances(corpus, SHARES)
    by_speaker = {}
    for item, split in zip(corpus, splits, strict=True):
        by_speaker.setdefault(item.speaker, set()).add(split)
    assert all(len(found) == 1 for found in by_speaker.values())
    for seed in range(20):
        splits = split_utterances(corpus, SHARES, seed)
        shares = [splits.count(name) / len(corpus) for name in ("train", "dev", "test")]
        assert shares == pytest.approx(SHARES, abs=0.1) and min(shares) > 0


def test_splits_depend_on_the_seed(corpus):
    draws = [split_utterances(corpus, SHARES, seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_parts_of_a_recording_are_in_one_split():
    parts = [utterance(f"/long{n % 4}.wav#t={n},{n + 1}") for n in range(40)]
    splits = split_utterances(parts, (0.5, 0.25, 0.25))
    assert all(len({splits[n] for n in range(start, 40, 4)}) == 1 for start in range(4))
    assert [splits.count(name) for name in ("train", "dev", "test")] == [20, 10, 10]


def test_a_speaker_in_the_recording_of_another_joins_both():
    corpus = [utterance("/a.wav#t=0,1", "x"), utterance("/a.wav#t=1,2", "y"), utterance("/b.wav", "y")]
    corpus += [utterance(f"/{n}.wav", f"s{n}") for n in range(20)]
    for seed in range(5):
        assert len(set(split_utterances(corpus, SHARES, seed)[:3])) == 1


def test_one_recording_under_two_names_is_in_one_split(tmp_path):
    names = []
    for number in range(10):
        path = tmp_path / f"{number}.wav"
        path.write_bytes(b"x")
        os.link(path, tmp_path / f"link{number}.wav")
        names += [str(path), str(tmp_path / f"link{number}.wav")]
    splits = split_utterances([utterance(name) for name in names], SHARES)
    assert splits[::2] == splits[1::2] and len(set(splits)) == 3


def test_copies_of_parts_of_one_recording_are_in_one_split():
    corpus = [utterance(f"/shar.tar::{n}.flac@{n}+9", origin=f"r{n // 5}") for n in range(50)]
    splits = split_utterances(corpus, SHARES)
    assert all(len(set(splits[start : start + 5])) == 1 for start in range(0, 50, 5))


def test_all_recordings_of_a_dialogue_count():
    def dialogue(*paths):
        turns = [{"role": "user", "content": f"<|startofspeech|>!{path}<|endofspeech|>"} for path in paths]
        return utterance(paths[0], messages=turns)

    corpus = [dialogue("/a.wav", "/b.wav"), dialogue("/b.wav"), *(utterance(f"/{n}.wav") for n in range(20))]
    for seed in range(5):
        assert len(set(split_utterances(corpus, (1, 1, 1), seed)[:2])) == 1


@pytest.mark.parametrize("number, splits", [(1, ["train"]), (2, ["dev", "train"]), (3, ["dev", "test", "train"])])
def test_small_corpora_have_as_many_splits_as_groups(number, splits):
    corpus = [utterance(f"/{n}.wav") for n in range(number)]
    assert sorted(split_utterances(corpus, (0.9, 0.05, 0.05))) == splits


def test_a_share_of_0_gives_no_split(corpus):
    assert set(split_utterances(corpus, (0.9, 0.1, 0))) == {"train", "dev"}
    with pytest.raises(ValueError, match="three numbers"):
        split_utterances(corpus, (0, 0, 0))


@pytest.mark.parametrize(
    "given, own",
    [
        (["train", "dev"], ["train", "dev"]), (["test", "test"], ["test", "test"]), (["train", "train"], None),
        (["train", None], None), ([], None),
    ],
)  # fmt: skip
def test_splits_of_the_source_are_used_if_complete(given, own):
    assert own_splits([utterance("/a.wav", split=split) for split in given]) == own


def test_a_source_with_splits_of_some_rows_is_not_drawn_again():
    rows = [utterance(f"/{n}.wav", split=split) for n, split in enumerate(["train", "test", None])]
    with pytest.raises(BadDataError, match="no split for 1 of 3 rows"):
        choose_splits(rows, None, SHARES, 0)
    assert choose_splits(rows, SHARES, SHARES, 0)[1].startswith("drawn")
    assert choose_splits([rows[0], rows[2]], None, SHARES, 0)[1].startswith("drawn")
