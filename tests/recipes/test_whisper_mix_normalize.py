import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def normalize_in_ascii_locale(*paths):
    command = [sys.executable, ROOT / "recipes" / "whisper_mix_normalize.py", *paths]
    subprocess.run(command, env={"PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0"}, check=True)


def test_two_files_are_normalised_and_scored_as_in_the_original(tmp_path):
    (tmp_path / "ref").write_text("utt1 他们選擇了A方案。\nutt2\tIt's my favourite!\nutt3 你好\n", encoding="utf-8")
    (tmp_path / "hyp").write_text("utt3\t\nutt1\t他们选择 A 方案\nutt2\tit is my flavor\n", encoding="utf-8")
    for name in ("ref", "hyp"):
        normalize_in_ascii_locale(tmp_path / name, tmp_path / f"{name}_norm")
    assert (tmp_path / "ref_norm").read_text(encoding="utf-8") == (
        "utt1\t他 们 选 择 了 a 方 案\nutt2\tit is my favorite\nutt3\t你 好\n"
    )
    assert (tmp_path / "hyp_norm").read_text(encoding="utf-8") == (
        "utt3\t\nutt1\t他 们 选 择 a 方 案\nutt2\tit is my flavor\n"
    )

    compute_wer = Path(sys.executable).with_name("compute-wer")
    files = [tmp_path / name for name in ("ref_norm", "hyp_norm", "cer.txt")]
    subprocess.run([compute_wer, *files], check=True, capture_output=True)
    tail = (tmp_path / "cer.txt").read_text(encoding="utf-8").splitlines()[-8:]
    assert tail[0].startswith("hyp: ") and tail[1] == ""
    assert set(tail[2]) == set(tail[7]) == {"="}
    assert [tail[3], *sorted(tail[4:6]), tail[6]] == [  # compute-wer lists scripts in any order
        "Overall -> 28.57 % N=14 Cor=10 Sub=1 Del=3 Ins=0",
        "Chinese -> 33.33 % N=9 Cor=6 Sub=0 Del=3 Ins=0",
        "English -> 20.00 % N=5 Cor=4 Sub=1 Del=0 Ins=0",
        "SER -> 100.00 % N=3 Cor=0 Err=3 ML=0 MH=0",
    ]


def test_format_of_lines(tmp_path, run_recipe, caplog):
    source, target = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_bytes("\ufeffa  你好 世界 \r\nb\tx\r\n\r\nc\nd\t \n e　全角\n".encode())
    assert run_recipe("whisper_mix_normalize.py", source, target) == 0
    assert target.read_bytes().decode() == "a\t你 好 世 界\nb\tx\nc\t\nd\t\ne\t全 角\n"
    assert f"{source}:3: blank line" in caplog.text


def test_output_may_replace_the_input(tmp_path, run_recipe):
    path = tmp_path / "text"
    path.write_text("a 二十\n", encoding="utf-8")
    for _ in range(2):
        assert run_recipe("whisper_mix_normalize.py", path, path) == 0
        assert path.read_text(encoding="utf-8") == "a\t2 0\n"


@pytest.mark.parametrize("existed", [True, False])
def test_a_line_that_is_not_utf8_is_named_and_nothing_is_written(tmp_path, run_recipe, caplog, existed):
    source, target = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_bytes("a 好\nb 坏".encode() + "坏\n".encode("gb18030"))
    if existed:
        target.write_text("old")
    assert run_recipe("whisper_mix_normalize.py", source, target) == 1
    assert f"{source}:2: not UTF-8" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == (["in.txt", "out.txt"] if existed else ["in.txt"])
    assert not existed or target.read_text() == "old"


def test_files_that_cannot_be_used_are_named(tmp_path, run_recipe, caplog, capsys):
    (tmp_path / "in.txt").write_text("a b\n")
    assert run_recipe("whisper_mix_normalize.py", tmp_path / "missing.txt", tmp_path / "out.txt") == 1
    assert f"{tmp_path / 'missing.txt'}: no such file" in capsys.readouterr().err
    assert run_recipe("whisper_mix_normalize.py", tmp_path / "in.txt", tmp_path / "in.txt" / "out.txt") == 1
    assert str(tmp_path / "in.txt") in caplog.text


def test_lines_keep_their_ids_and_order(tmp_path, run_recipe, shared):
    folder, target = shared / "golden" / "normalize", tmp_path / "out.txt"
    if not folder.is_dir():
        pytest.skip("no golden/normalize in ../shared")
    assert run_recipe("whisper_mix_normalize.py", folder / "in.txt", target) == 0
    ids = [
        [line.split("\t")[0] for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (target, folder / "original.txt")
    ]
    assert ids[0] == ids[1]
