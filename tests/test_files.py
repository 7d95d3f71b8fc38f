import os
import stat

import pytest

from hf_speechllm.files import atomic_write


def test_text_is_written_in_utf8_with_plain_line_ends(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as file:
        file.write("一\né\n")
    assert path.read_bytes() == "一\né\n".encode()
    assert os.listdir(tmp_path) == ["a.txt"]


def test_bytes_and_other_encodings(tmp_path):
    with atomic_write(tmp_path / "b", mode="wb") as file:
        file.write(b"\x00\xff")
    with atomic_write(str(tmp_path / "c"), encoding="gb18030") as file:
        file.write("中")
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"
    assert (tmp_path / "c").read_bytes() == "中".encode("gb18030")


def test_missing_folders_are_created(tmp_path):
    with atomic_write(tmp_path / "new" / "folder" / "a.txt") as file:
        file.write("a")
    assert (tmp_path / "new" / "folder" / "a.txt").read_text() == "a"


def test_readers_get_the_old_content_until_the_block_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
        assert len(os.listdir(tmp_path)) == 2  # the temporary file is in the same folder, on the same file system
    assert path.read_text() == "new"


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existed", [True, False])
def test_failure_leaves_the_file_unchanged(tmp_path, failure, existed):
    path = tmp_path / "a.txt"
    if existed:
        path.write_text("old")
    with pytest.raises(failure), atomic_write(path) as file:
        file.write("half")
        raise failure
    assert os.listdir(tmp_path) == (["a.txt"] if existed else [])
    assert not existed or path.read_text() == "old"


def test_unencodable_text_leaves_the_file_unchanged(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), atomic_write(path, encoding="ascii") as file:
        file.write("é" * 100_000)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_permissions_are_those_of_an_ordinary_or_the_replaced_file(tmp_path):
    ordinary, path = tmp_path / "ordinary", tmp_path / "a.txt"
    ordinary.touch()
    with atomic_write(path) as file:
        file.write("x")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)
    path.chmod(0o640)
    with atomic_write(path) as file:
        file.write("y")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_symbolic_link_stays(tmp_path):
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    with atomic_write(link) as file:
        file.write("new")
    assert link.is_symlink() and target.read_text() == "new"


def test_long_names_fit(tmp_path):
    path = tmp_path / ("长" * 80)  # 240 of the 255 bytes that a name may have
    with atomic_write(path) as file:
        file.write("x")
    assert path.read_text() == "x"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="a folder in which nobody can create files")
def test_errors_name_the_file_and_not_the_temporary_one():
    with pytest.raises(OSError) as error, atomic_write("/proc/self/a.txt"):
        pass
    assert error.value.filename == "/proc/self/a.txt"


def test_folders_and_devices_are_refused(tmp_path):
    with pytest.raises(OSError, match="not a regular file"), atomic_write(tmp_path):
        pass
    with pytest.raises(OSError, match="not a regular file"), atomic_write(os.devnull):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(OSError), atomic_write(tmp_path / "file" / "a.txt"):
        pass
    with pytest.raises(ValueError, match="mode"), atomic_write(tmp_path / "a.txt", mode="a"):
        pass
    assert os.listdir(tmp_path) == ["file"]
