"""Large JSON files are read element by element, with any size of the pieces that are read at once."""

import json
import tracemalloc

import pytest

from hf_speechllm.data.sources import json_arrays
from hf_speechllm.data.sources.json_arrays import read_array

ELEMENTS = [1234, -1.5e-3, True, None, 'a \\ " ] é 你', {"a": [1, {"b": []}], "c": "}"}, [], [[1], 2]]


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_elements_are_those_of_json_load(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(json_arrays, "CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ELEMENTS, indent=indent, ensure_ascii=False), encoding="utf-8-sig")
    assert list(read_array(path)) == ELEMENTS
    content = {"first": {"audios": [0]}, "second": "audios", "audios": ELEMENTS, "last": 1}
    path.write_text(json.dumps(content, indent=indent), encoding="utf-8")
    assert list(read_array(path, "audios")) == ELEMENTS
    path.write_text(" [ ] ")
    assert list(read_array(path)) == []


@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "ends early"),
        ("[1, 2", "ends early"),
        ('[1, "a', "Unterminated string"),
        ("[1 2]", "'2' instead of , or ] at character 4"),
        ("[nul, 1" + " " * 99 + "]", "Expecting value at character 2"),
        ('{"a": 1}', "instead of \\["),
        ("[1,]" + " " * 99, "Expecting value at character 4"),
        ("[1, 2] \n[3]", "more text after the end of the JSON at character 9"),
        ("[]garbage", "more text after the end of the JSON at character 3"),
        ("[1.x]", "'\\.' instead of , or \\] at character 3"),
        ("[2e+x]", "'e' instead of , or \\] at character 3"),
    ],
)
def test_damaged_files_are_errors(tmp_path, monkeypatch, chunk, content, message):
    monkeypatch.setattr(json_arrays, "CHUNK", chunk)
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_array(tmp_path / "a.json"))


@pytest.mark.parametrize("rest", ['{"a": [2]}', ', "b": 1', "}]"])
def test_text_after_the_array_of_a_key_is_an_error(tmp_path, rest):
    (tmp_path / "a.json").write_text('{"a": [1]' + ("}" if rest[0] == "{" else "") + rest)
    with pytest.raises(ValueError, match="more text after the end of the JSON|ends early"):
        list(read_array(tmp_path / "a.json", "a"))


def test_missing_key_is_an_error(tmp_path):
    (tmp_path / "a.json").write_text('{"b": [1]}')
    with pytest.raises(ValueError, match="no key 'a'"):
        list(read_array(tmp_path / "a.json", "a"))


def test_memory_does_not_depend_on_the_size(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "x" * 1000}] * 20_000))  # 20 MB
    tracemalloc.start()
    assert sum(1 for _ in read_array(path)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6
