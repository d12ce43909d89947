import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from steersman.trainer.data.rows import BadRow, DataError, Row, read_rows

ROWS = [{"prompt": "a", "n": 1}, {"prompt": "ü", "n": 2}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture(params=["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def file(request, tmp_path):
    path = tmp_path / request.param
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(LINES.encode()))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        path.write_text(LINES)
    return str(path)


def test_every_kind_of_file_gives_the_same_rows_with_their_place(file):
    rows = list(read_rows(file))
    assert [row.fields for row in rows] == ROWS
    assert [str(row.origin) for row in rows] == [f"{file}:1", f"{file}:2"]


def test_a_url_is_read_through_fsspec(file):
    assert [row.fields for row in read_rows(f"file://{file}")] == ROWS


def test_a_line_that_is_no_object_is_a_bad_row_and_the_rest_goes_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": \n[1]\n{"a": 2}\n')
    rows = list(read_rows(str(path)))
    assert [type(row) for row in rows] == [Row, BadRow, BadRow, Row]
    assert str(rows[1]).startswith(f"{path}:3: is not valid JSON")
    assert str(rows[2]) == f"{path}:4: is a JSON list, must be an object"
    assert rows[3].origin.line == 5


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    cases = {"missing.jsonl": "no such file", "rows.csv": "unknown kind of file", "s9://bucket/x.jsonl": "s9"}
    for name, message in cases.items():
        with pytest.raises(DataError, match=message):
            list(read_rows(name if "://" in name else str(tmp_path / name)))


def test_a_file_that_was_cut_off_is_an_error_and_not_an_end(tmp_path):
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress((LINES * 1000).encode())[:-20])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz: cannot be read"):
        list(read_rows(str(path)))
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"broken\.parquet: cannot be read"):
        list(read_rows(str(broken)))
