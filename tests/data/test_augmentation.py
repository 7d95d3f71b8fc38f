"""Augmentation that options select: reproducible, within the batch budget, and refused with cached features."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from hf_speechllm.audio.augmentation import AddNoise
from hf_speechllm.data.augmentation import waveform_augmentation
from hf_speechllm.data.augmentation_options import AugmentationOptions
from hf_speechllm.data.collator import SpeechLLMCollator
from hf_speechllm.data.dataset import prepare_rows, row_seconds
from hf_speechllm.data.options import DataOptions
from hf_speechllm.data.sampler import BudgetBatchSampler, KeyedRows, budget_before_augmentation
from hf_speechllm.data.streaming import RowStream, StreamState

# Everything at once, so that each row has several transforms.
STRONG = {
    "speed_prob": 0.5, "noise_prob": 0.7, "gain_prob": 0.5, "telephone_prob": 0.3, "codec_prob": 0.3,
    "reverb_prob": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    """A folder with an impulse response."""
    folder = tmp_path_factory.mktemp("rooms")
    response = np.random.default_rng(0).standard_normal(2000) * np.exp(-np.arange(2000) / 300)
    soundfile.write(folder / "room.wav", response / np.abs(response).max(), 16000)
    return str(folder)


@pytest.fixture
def rows(tiny_corpus, processor, tmp_path):
    """The rows of the corpus, without cached features."""
    options = DataOptions(cache_dir=str(tmp_path / "cache"), feature_cache="off", preprocessing_num_workers=1)
    return prepare_rows([str(tiny_corpus.jsonl)], processor, 2048, options)[0]


@pytest.fixture
def make_collator(processor, rows, rooms):
    def make(**options):
        if options.get("reverb_prob"):
            options.setdefault("reverb_source", [rooms])
        collator = SpeechLLMCollator.augmenting(processor, AugmentationOptions(**options))
        collator.use_training_rows(rows)
        return collator

    return make


def features_by_key(rows, collator, batches, workers=0):
    """Loads batches as training does; returns the features of each row by its key."""
    batches = [batch for batch in batches if batch]
    loader = torch.utils.data.DataLoader(
        KeyedRows(rows, seed=3), batch_sampler=batches, collate_fn=collator, num_workers=workers
    )
    found = {}
    for keys, batch in zip(batches, loader, strict=True):
        for key, features, mask in zip(keys, batch["input_features"], batch["input_features_mask"], strict=True):
            found[key] = features[mask.bool()]
    return found


def test_a_row_has_the_same_augmentation_in_any_batch_on_any_rank_and_worker(rows, make_collator):
    collator = make_collator(**STRONG, spec_augment=True)
    plain = {rank: list(BudgetBatchSampler(row_seconds(rows), 6.0, 2, rank, seed=3)) for rank in range(2)}
    alone = features_by_key(rows, collator, BudgetBatchSampler(row_seconds(rows), 9.0, seed=3))
    on_ranks = [features_by_key(rows, make_collator(**STRONG, spec_augment=True), plain[rank]) for rank in range(2)]
    in_workers = features_by_key(rows, make_collator(**STRONG, spec_augment=True), plain[0] + plain[1], workers=2)
    assert alone.keys() == {*on_ranks[0], *on_ranks[1]} == in_workers.keys() == {*range(24)}
    for other in (*on_ranks, in_workers):
        assert all(torch.equal(alone[key], features) for key, features in other.items())


def test_augmentation_differs_between_epochs_rows_and_seeds(rows, make_collator):
    collator = make_collator(gain_prob=1.0)
    row = rows[0]

    def first(*seed):
        return collator.row_waveforms({**row, "seed": seed})[0]

    assert np.array_equal(first(0, 5), first(0, 5))
    again = pickle.loads(pickle.dumps(make_collator(**STRONG)))  # as for a process that is started without `fork`
    assert np.array_equal(
        again.row_waveforms({**row, "seed": (0, 5)})[0],
        make_collator(**STRONG).row_waveforms({**row, "seed": (0, 5)})[0],
    )
    assert len({first(*seed).tobytes() for seed in ((0, 5), (0, 29), (0, 6), (1, 5))}) == 4


def test_without_options_nothing_changes(rows, processor, make_collator):
    collator, plain = make_collator(), SpeechLLMCollator(processor)
    assert replace(collator, augmentations=()) == plain
    batch = KeyedRows(rows, 3).__getitems__([0, 1, 25])
    assert torch.equal(collator(batch)["input_features"], plain(batch)["input_features"])


def test_augmentation_changes_the_features_but_not_the_labels(rows, processor, make_collator):
    batch = KeyedRows(rows, 3).__getitems__([*range(6)])
    augmented, plain = make_collator(noise_prob=1.0, codec_prob=1.0)(batch), SpeechLLMCollator(processor)(batch)
    assert augmented["input_features"].shape == plain["input_features"].shape
    assert torch.equal(augmented["labels"], plain["labels"])
    assert (augmented["input_features"] - plain["input_features"]).abs().mean() > 0.1
    clean = make_collator(noise_prob=1.0, spec_augment=True, speed_prob=1.0).without_augmentation()
    assert torch.equal(clean(batch)["input_features"], plain["input_features"])
    assert clean == SpeechLLMCollator(processor)


def test_speed_changes_the_number_of_audio_tokens(rows, make_collator):
    batch = KeyedRows(rows, 3).__getitems__([*range(12)])
    built = make_collator(speed_prob=1.0, speed_factors=[0.5])(batch)
    expected = [2 * seconds for seconds in row_seconds(rows)[:12]]
    assert built["input_features_mask"].sum(1).tolist() == pytest.approx(np.array(expected) / 0.06, abs=2)


def test_batches_fit_the_budget_after_a_change_of_speed(rows, make_collator):
    collator, seconds = make_collator(speed_prob=1.0, speed_factors=[0.8, 1.2]), row_seconds(rows)
    assert collator.largest_stretch == 1.25
    budget = budget_before_augmentation(seconds, 4.0, collator.largest_stretch)
    assert budget == 3.2
    for keys in BudgetBatchSampler(seconds, budget, seed=3):
        lengths = [len(item) for row in KeyedRows(rows, 3).__getitems__(keys) for item in collator.row_waveforms(row)]
        assert max(lengths) * len(lengths) <= 4.0 * 16000 * 1.02  # 25 ms of the last frame
    assert budget_before_augmentation([3.5], 4.0, 1.25) == 3.5  # a single long recording is not refused
    assert budget_before_augmentation([4.5], 4.0, 1.25) == 4.0
    assert budget_before_augmentation(seconds, 4.1, 1.0) == 4.1


def test_a_slower_speed_does_not_exceed_the_limit_of_the_encoder(processor):
    options = AugmentationOptions(speed_prob=1.0, speed_factors=[0.8], tempo_perturb=0.25)
    collator = SpeechLLMCollator.augmenting(processor, options, max_feature_frames=100)  # 6 s
    for seconds, expected in ((3.0, 3.75), (4.5, 4.5)):  # 4.5 s would become 7 s
        row = {"recordings": [np.ones(round(seconds * 16000), np.float32)], "seed": 1}
        assert len(collator.row_waveforms(row)[0]) == round(expected * 16000)


def test_rows_with_cached_features_are_refused(tiny_rows, processor):
    for options in ({"noise_prob": 0.5}, {"speed_prob": 0.5}, {"dither": 1.0}):
        collator = SpeechLLMCollator.augmenting(processor, AugmentationOptions(**options))
        with pytest.raises(ValueError, match="feature_dtype='off'"):
            collator.use_training_rows(tiny_rows)
    SpeechLLMCollator.augmenting(processor, AugmentationOptions(spec_augment=True)).use_training_rows(tiny_rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_prob": 1.5}, "--noise_prob is 1.5; it must be between 0 and 1"),
        ({"noise_snr": [0.0, 10.0]}, "--noise_snr has no effect without --noise_prob; set --noise_prob"),
        (
            {"noise_prob": 0.5, "noise_snr": [20.0, 5.0]},
            "--noise_snr is 20 5; give the smallest and the largest value",
        ),
        ({"gain_prob": 0.5, "gain_db": [3.0]}, "--gain_db is 3; give"),
        ({"codec_prob": 0.5, "codec_kbps": [1.0, 8.0]}, "from 6 to 160"),
        ({"reverb_prob": 0.5, "reverb_seconds": [0.2, 9.0]}, "from 0.1 to 1"),
        ({"speed_prob": 0.5, "speed_factors": [0.9, 3.0]}, "--speed_factors is 0.9 3; give numbers from 0.5 to 2"),
        ({"noise_prob": 0.5, "noise_source": []}, "--noise_source is empty"),
        ({"dither": -1.0}, "--dither is -1.0"),
        ({"dither": float("nan")}, "--dither is nan"),
        ({"tempo_perturb": 1.0}, "--tempo_perturb is 1.0"),
    ],
)
def test_impossible_options_are_errors(options, message):
    with pytest.raises(ValueError) as error:
        AugmentationOptions(**options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "option", ["noise_prob", "speed_prob", "reverb_prob", "gain_prob", "telephone_prob", "codec_prob"]
)
def test_cached_features_are_refused_by_the_options(option):
    with pytest.raises(ValueError) as error:
        DataOptions(**{option: 0.5})
    assert str(error.value).startswith(f"--{option} 0.5 with --feature_cache float16 would repeat the same")
    assert str(error.value).endswith("set --feature_cache off")
    assert getattr(DataOptions(feature_cache="off", **{option: 0.5}), option) == 0.5


def test_babble_needs_all_rows(rows, processor, tiny_corpus):
    with pytest.raises(ValueError, match="--noise_source babble .* not available with --streaming; choose"):
        DataOptions(streaming=True, noise_prob=0.5)
    DataOptions(streaming=True, noise_prob=0.5, noise_source=["white"])
    collator = SpeechLLMCollator.augmenting(processor, AugmentationOptions(noise_prob=1.0))
    stream = RowStream([str(tiny_corpus.jsonl)], collator, 4.0, 2048)
    with pytest.raises(ValueError, match="babble needs rows with random access"):
        collator.use_training_rows(stream)


def test_babble_consists_of_the_training_rows(rows, processor):
    collator = SpeechLLMCollator.augmenting(
        processor, AugmentationOptions(noise_prob=1.0, noise_source=["babble"], noise_snr=[0.0, 0.0])
    )
    collator.use_training_rows(rows)
    time = np.arange(32_000) / 16000
    tone = np.sin(2 * np.pi * 7000 * time).astype(np.float32)
    (noisy,) = collator.row_waveforms({"recordings": [tone], "seed": 1})
    spectrum = np.abs(np.fft.rfft(noisy)) ** 2
    words = sum(spectrum[2 * f - 20 : 2 * f + 20].sum() for f in range(200, 2400, 300))  # the pitches of the corpus
    assert words / spectrum[: 2 * 6900].sum() > 0.9


def test_missing_sources_are_errors(monkeypatch, tmp_path):
    for option in ("noise", "reverb"):
        options = AugmentationOptions(**{f"{option}_prob": 0.5, f"{option}_source": [str(tmp_path / "gone")]})
        with pytest.raises(ValueError, match=f"--{option}_source: .*gone: no such folder"):
            waveform_augmentation(options, 16000)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'hf_speechllm\[augment\]'"):
        waveform_augmentation(AugmentationOptions(reverb_prob=0.5), 16000)
    assert waveform_augmentation(AugmentationOptions(noise_prob=0.5), 16000).noises
    assert isinstance(waveform_augmentation(AugmentationOptions(noise_prob=0.5), 16000).steps[0][1], AddNoise)


def test_streams_resume_with_the_same_augmentation(processor, tiny_corpus, rooms, monkeypatch):
    monkeypatch.setattr("hf_speechllm.data.shards.BLOCK_SIZE", 1000)
    options = AugmentationOptions(**STRONG, noise_source=["white", "pink"], reverb_source=[rooms])
    slow = SpeechLLMCollator.augmenting(processor, AugmentationOptions(speed_prob=1.0, speed_factors=[0.5]))

    strong = SpeechLLMCollator.augmenting(processor, options)

    def take(number, state, collator=strong):
        batches = RowStream([str(tiny_corpus.jsonl)], collator, 4.0, 2048, window_rows=8).batches(state, 0, 1)
        return [next(batches) for _ in range(number)]

    whole = take(16, StreamState())
    assert max(batch["input_features_mask"].numel() * 0.06 for batch, _ in take(10, StreamState(), slow)) <= 4.0
    for (batch, _), (again, _) in zip(whole[7:], take(9, whole[6][1]), strict=True):
        assert torch.equal(batch["input_features"], again["input_features"])
        assert torch.equal(batch["labels"], again["labels"])
