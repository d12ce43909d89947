import json
import os
from pathlib import Path

import pytest

from steersman.trainer.data.load import load_comparisons, load_demonstrations, load_prompts
from steersman.trainer.data.rows import BadRow, DataError
from steersman.trainer.data.settings import DataSettings

GOOD = {"prompt": "Q", "chosen": "good", "rejected": "bad"}


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write


def test_a_bad_row_stops_reading_and_names_file_line_and_reason(write):
    file = write(GOOD, GOOD | {"rejected": ""})
    with pytest.raises(BadRow) as caught:
        load_comparisons(DataSettings(files=(file,)))
    assert str(caught.value) == f"{file}:2: rejected is empty"


def test_bad_rows_are_skipped_and_counted(write):
    file = write("{broken", GOOD, {"text": "?"}, GOOD | {"prompt": None})
    records, report = load_comparisons(DataSettings(files=(file,), on_bad_row="skip"))
    assert len(records) == report.num_records == 1
    assert report.num_bad_rows == 3
    assert [bad.origin.line for bad in report.bad_rows] == [1, 3, 4]
    assert report.forms == {file: "preference"}


def test_the_form_is_found_for_each_file(write):
    ranked = write({"prompt": "R", "responses": ["a", "b", "c"]}, name="ranked.jsonl")
    zero = write(
        {"input_text": "C", "candidate1": "a", "candidate2": "b", "human_preference": 1},
        {"input_text": "C", "candidate1": "a", "candidate2": "b", "human_preference": 0},
        name="zero.jsonl",
    )
    records, report = load_comparisons(DataSettings(files=(write(GOOD), ranked, zero)))
    assert [record.ranks for record in records] == [(1, 2), (1, 2, 3), (2, 1), (1, 2)]
    assert list(report.forms.values()) == ["preference", "ranked", "candidates"]


def test_the_base_can_be_set_where_the_file_leaves_it_open(write):
    file = write({"input_text": "C", "candidate1": "a", "candidate2": "b", "human_preference": 1})
    with pytest.raises(BadRow, match="set preference_base"):
        load_comparisons(DataSettings(files=(file,)))
    assert load_comparisons(DataSettings(files=(file,), preference_base=1))[0][0].best == "a"


def test_demonstrations_and_prompts_come_from_comparisons_too(write):
    settings = DataSettings(files=(write(GOOD),))
    assert load_demonstrations(settings)[0][0].completion == "good"
    assert load_prompts(settings)[0][0].prompt == "Q"
    with pytest.raises(BadRow, match="holds no comparison"):
        load_comparisons(DataSettings(files=(write({"prompt": "Q", "completion": "A"}),)))


def test_nothing_left_is_an_error(write):
    with pytest.raises(DataError, match=r"no usable row .* the first bad row: .*:1: rejected is empty"):
        load_comparisons(DataSettings(files=(write(GOOD | {"rejected": ""}),), on_bad_row="skip"))


def test_no_more_records_than_asked_for(write):
    records, _ = load_comparisons(DataSettings(files=(write(GOOD, GOOD, "{broken"),), max_records=2))
    assert len(records) == 2


@pytest.mark.skipif("STEERSMAN_HH_DATA" not in os.environ, reason="STEERSMAN_HH_DATA names no HH file")
def test_real_human_comparisons_are_read_and_each_bad_row_is_counted():
    file = os.environ["STEERSMAN_HH_DATA"]
    assert Path(file).is_file()
    records, report = load_comparisons(DataSettings(files=(file,), on_bad_row="skip"))
    assert report.forms == {file: "transcript"}
    assert 0 < report.num_bad_rows < len(records) // 100
    assert all(record.prompt[-1].role == "user" for record in records)
