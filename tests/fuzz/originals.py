"""Undamaged inputs (recordings of many encoders, archives), and functions that damage bytes, texts and settings."""

from __future__ import annotations

import functools
import io
import json
import random
import tarfile

import av
import numpy as np
import pyarrow
import pyarrow.parquet
import soundfile

SECONDS = 1.2
# (container, codec) of libsndfile.
BY_LIBSNDFILE = [
    ("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "PCM_32"), ("WAV", "FLOAT"), ("WAV", "IMA_ADPCM"), ("WAV", "ULAW"),
    ("WAV", "GSM610"), ("WAVEX", "PCM_16"), ("RF64", "PCM_16"), ("W64", "PCM_16"), ("AIFF", "PCM_16"), ("AU",
    "PCM_16"),
    ("CAF", "PCM_16"), ("CAF", "ALAC_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"), ("NIST", "PCM_16"),
]  # fmt: skip
BY_FFMPEG = [
    ("ipod", "aac"), ("mp4", "aac"), ("matroska", "libopus"), ("webm", "libopus"), ("adts", "aac"), ("mp3",
    "libmp3lame"),
    ("tta", "tta"), ("wv", "wavpack"), ("mpegts", "aac"), ("avi", "libmp3lame"), ("flv", "aac"), ("mov", "pcm_s16le"),
    ("wav", "libmp3lame"), ("voc", "pcm_s16le"), ("ac3", "ac3"),
]  # fmt: skip
# Containers with a length: truncation must be detected. Others are streams of frames without a length.
ANNOUNCED = {name for name, _ in (*BY_LIBSNDFILE, *BY_FFMPEG)} - {"adts", "mpegts", "ac3", "flv", "mp3", "tta", "wv"}
CHECKED = ("FLAC", "OGG")  # containers with checksums over all samples
# After a recording without a length, a second recording is found only if it has a signature.
END_UNKNOWN, UNMARKED = ("FLAC", "tta", "flv", "mpegts", "adts", "ac3"), ("adts", "mpegts", "ac3", "mp3", "MP3")
RATES = {"libopus": 48000, "ac3": 48000, "libmp3lame": 44100, "flv": 44100, "GSM610": 8000}


def _tone(rate: int, frequency: float = 440.0) -> np.ndarray:
    time = np.arange(int(SECONDS * rate)) / rate
    noise = 0.05 * np.random.default_rng(0).standard_normal(len(time))
    return (0.4 * np.sin(2 * np.pi * frequency * time) + noise).astype(np.float32)


@functools.cache
def recordings() -> dict[str, bytes]:
    """Returns recordings with a duration of `SECONDS`, by "CONTAINER CODEC"."""
    found = {}
    for container, codec in BY_LIBSNDFILE:
        rate = RATES.get(codec, 16000)
        file = io.BytesIO()
        soundfile.write(file, _tone(rate), rate, format=container, subtype=codec)
        found[f"{container} {codec}"] = file.getvalue()
    for container, codec in BY_FFMPEG:
        file = io.BytesIO()
        rate = RATES.get(container, RATES.get(codec, 16000))
        with av.open(file, "w", format=container) as output:
            stream = output.add_stream(codec, rate=rate, layout="mono")
            context = stream.codec_context
            samples = (_tone(rate) * 32767).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
            frame.sample_rate = rate
            resampler = av.AudioResampler(context.format.name, "mono", rate, frame_size=context.frame_size or None)
            for part in [*resampler.resample(frame), *resampler.resample(None), None]:
                for packet in stream.encode(part):
                    output.mux(packet)
        found[f"{container} {codec}"] = file.getvalue()
    return found


def damage(data: bytes, rng: random.Random) -> bytes:
    """Changes, removes, inserts, repeats or truncates bytes, more often in headers than elsewhere."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        if not result:
            break
        place = rng.randrange(min(len(result), rng.choice((16, 64, 600, len(result)))))
        action = rng.choice(("set", "set", "field", "field", "flip", "cut", "insert", "double", "end", "zero"))
        if action == "set":
            result[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif action == "field":  # an integer of 2, 4 or 8 bytes, in either byte order
            width = rng.choice((2, 4, 8))
            bits = 8 * width
            value = rng.choice((0, 1, 2, (1 << bits - 1) - 1, 1 << bits - 1, (1 << bits) - 1, rng.getrandbits(bits)))
            result[place : place + width] = value.to_bytes(width, rng.choice(("big", "little")))
        elif action == "flip":
            result[place] ^= 1 << rng.randrange(8)
        elif action == "cut":
            del result[place : place + rng.choice((1, 4, 512, 2000))]
        elif action == "insert":
            result[place:place] = rng.randbytes(rng.randrange(1, 40))
        elif action == "double":
            result[place:place] = result[place : place + 512]
        elif action == "zero":
            result[place : place + 64] = bytes(len(result[place : place + 64]))
        else:
            del result[place:]
    return bytes(result)


# Unusual texts in lists and transcripts from untrusted sources.
ODD_TEXTS = [
    "\u00a0", "\u3000", "\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x85", "\ufeff", "\u200b", "\t", "  ",
    "\0", "\x1b[31m",
    "<|im_end|>", "<|endoftext|>", "<|object_ref_start|>", "<|startofspeech|>", "<think>", "<s>", "</s>",
    "[CLS]", "\\", '"',
    "\\ud800", "|", "::", "*", "../", "~", "https://u:secret@h/a b'c?key=secret", "\u202e", "x" * 5000,
    "\U0001f600", "a\u0301",
]  # fmt: skip
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "gb18030", "latin-1", "utf-32"]


def odd(text: str, rng: random.Random) -> str:
    """Inserts an unusual text at the start, at the end or inside a text."""
    place = rng.choice((0, len(text), rng.randrange(len(text) + 1)))
    return text[:place] + rng.choice(ODD_TEXTS) + text[place:]


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    """Returns a tar file with these members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def parquet_of(rows: list[dict], rng: random.Random) -> bytes:
    """Returns a Parquet file with these rows."""
    buffer = io.BytesIO()
    compression = rng.choice(("snappy", "none", "zstd", "gzip"))
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), buffer, row_group_size=rng.choice((1, 3, 100)), compression=compression
    )
    return buffer.getvalue()


# Values and keys of hostile configurations.
VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 10**5, 10**9, 2**31, 2**63, 10**30, 0.5, -1.5, 1e300, float("inf"),
    "", "a", "1",
    "../x", "/etc/passwd", "org/kernel", "x" * 5000, "\x1b[31m\n", [], {}, [1], ["a"], [[1]], {"a": 1},
    [None], [10**9] * 3,
    "float16", "bfloat16", "int8", "gelu", "nonsense", "eager", "flash_attention_2", "qwen3", "whisper",
    "llama", "bert",
]  # fmt: skip
KEYS = [
    "auto_map", "quantization_config", "_attn_implementation", "attn_implementation", "num_blocks", "dtype",
    "torch_dtype",
    "tie_word_embeddings", "model_type", "architectures", "vocab_size", "num_hidden_layers", "hidden_size",
    "rope_parameters",
    "rope_scaling", "layer_types", "pruned_heads", "is_decoder", "chunk_size_feed_forward", "problem_type", "id2label",
    "num_labels", "eos_token_id", "num_return_sequences", "custom_generate", "assistant_model",
    "stop_strings", "peft_type",
    "base_model_name_or_path", "target_modules", "rank_pattern", "r", "lora_alpha", "chat_template", "tokenizer_class",
    "feature_extractor_type", "sampling_rate", "feature_size", "use_cache", "output_attentions", "return_dict",
]  # fmt: skip


def places(value, path=()):
    """Yields the paths (keys and indices) of all values in nested settings."""
    if path:
        yield path
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, key))


def change_settings(content, rng: random.Random):
    """Returns a copy of settings with one value replaced, removed or added."""
    content = json.loads(json.dumps(content))
    path = rng.choice(list(places(content)) or [()])
    target = content
    for key in path[:-1]:
        target = target[key]
    action = rng.choice(("set", "set", "set", "remove", "add"))
    if action == "add" or not path:
        holders = [content, *(item for item in content.values() if isinstance(item, dict))]
        rng.choice(holders)[rng.choice(KEYS)] = rng.choice(VALUES)
    elif action == "remove":
        del target[path[-1]]
    else:
        target[path[-1]] = rng.choice(VALUES)
    return content
