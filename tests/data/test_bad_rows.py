import logging

import pytest

from hf_speechllm.data.bad_rows import BadDataError, BadRow, BadRows


def rows_with(count, **options):
    bad_rows = BadRows(**options)
    for line in range(1, count + 1):
        bad_rows.add("train.jsonl", line, f"not JSON: number {line}")
    return bad_rows


def test_row_is_written_as_file_line_reason():
    assert str(BadRow("a/wav.scp", 7, "one field only")) == "a/wav.scp:7: one field only"


def test_one_bad_row_is_an_error_by_default():
    with pytest.raises(BadDataError) as error:
        rows_with(1).check(total=8)
    message = str(error.value)
    assert "train.jsonl:1: not JSON: number 1" in message
    assert "1 of 8" in message and "12.50%" in message
    assert "--max_bad_fraction 0.125" in message


@pytest.mark.parametrize("bad, total, stops", [(1, 10, False), (2, 10, True), (0, 10, False), (0, 0, False)])
def test_run_continues_up_to_the_allowed_fraction(bad, total, stops):
    bad_rows = rows_with(bad, max_bad_fraction=0.1)
    if stops:
        with pytest.raises(BadDataError):
            bad_rows.check(total)
    else:
        bad_rows.check(total)


def test_suggested_fraction_suffices():
    with pytest.raises(BadDataError) as error:
        rows_with(1).check(total=3)
    suggested = float(str(error.value).rpartition(" ")[2])
    rows_with(1, max_bad_fraction=suggested).check(total=3)


def test_skipped_rows_are_listed_in_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        rows_with(2, max_bad_fraction=1).check(total=2)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "train.jsonl:1: " in caplog.text and "train.jsonl:2: " in caplog.text


def test_twenty_rows_are_listed_and_the_others_counted():
    with pytest.raises(BadDataError) as error:
        rows_with(23).check(total=100)
    message = str(error.value)
    assert "train.jsonl:20: " in message and "train.jsonl:21: " not in message
    assert "and 3 more" in message


def test_missing_recordings_say_where_relative_paths_start():
    bad_rows = rows_with(1)
    bad_rows.add("train.jsonl", 2, "/data/a.wav: no such file")
    with pytest.raises(BadDataError, match="start at the folder of the list, not at the working directory"):
        bad_rows.check(total=8)
    with pytest.raises(BadDataError) as error:
        rows_with(1).check(total=8)
    assert "Relative" not in str(error.value)


@pytest.mark.parametrize("allowed", [0, 1])
def test_report_file_contains_all_bad_rows(tmp_path, allowed):
    report = tmp_path / "bad.txt"
    bad_rows = rows_with(23, max_bad_fraction=allowed, report_file=report)
    if allowed:
        bad_rows.check(total=23)
    else:
        with pytest.raises(BadDataError, match="bad.txt"):
            bad_rows.check(total=23)
    assert report.read_text(encoding="utf-8").splitlines() == [str(row) for row in bad_rows]
    assert len(bad_rows) == 23


def test_no_report_without_bad_rows(tmp_path):
    BadRows(report_file=tmp_path / "bad.txt").check(total=5)
    assert not (tmp_path / "bad.txt").exists()


def test_kinds_are_counted_by_the_words_before_the_colon():
    bad_rows = rows_with(2)
    bad_rows.add("wav.scp", 3, 'duplicate ID: "a" is in line 1, too')
    assert bad_rows.kinds() == {"not JSON": 2, "duplicate ID": 1}


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_fraction_outside_zero_to_one_is_refused(fraction):
    with pytest.raises(ValueError, match="from 0 to 1"):
        BadRows(fraction)


def test_reason_contains_no_secrets_and_no_control_characters():
    row = BadRow("a.jsonl", "\x1b[31mkey", "https://me:secret@host/a.wav?token=secret: gone \x1b[2J")
    assert str(row) == "a.jsonl:\ufffd[31mkey: https://***@host/a.wav?***: gone \ufffd[2J"


def test_error_does_not_suggest_to_skip_all_rows():
    with pytest.raises(BadDataError) as error:
        rows_with(3).check(total=3)
    assert str(error.value).endswith("\nNo row is usable: check the format, the columns and the paths of train.jsonl")


def test_rows_are_listed_by_file_and_position():
    bad_rows = BadRows()
    for file, line in [("b", 10), ("a", "row 10"), ("b", 3), ("a", "row 9"), ("b", 2)]:
        bad_rows.add(file, line, "bad")
    assert [(row.file, row.line) for row in bad_rows] == [
        ("b", 2), ("b", 3), ("b", 10), ("a", "row 9"), ("a", "row 10"),
    ]  # fmt: skip
    with pytest.raises(BadDataError, match=r"(?s)b:2: .*b:3: .*b:10: .*a:row 9: .*a:row 10: "):
        bad_rows.check(9)
