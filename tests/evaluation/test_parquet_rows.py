"""Rows of Parquet files one at a time: what the library reads, in any order, in the memory of one value."""

import base64
import random

import pyarrow as pa
import pytest
from pyarrow import parquet

from vreflection.errors import DataError
from vreflection.evaluation.benchmarks import parquet_rows
from vreflection.evaluation.benchmarks.parquet_rows import RowReader


@pytest.mark.parametrize("group_size", [1, 3, 100])
def test_rows_are_read_forwards_and_backwards(tmp_path, group_size):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"n": list(range(10)), "text": [str(n) for n in range(10)]}), path, group_size)
    reader = RowReader(path, ("text",))
    for index in (0, 0, 1, 4, 3, 9, 9, 2, 0):
        assert reader.row(index) == {"text": str(index)}
    with pytest.raises(DataError, match="expected row 10, got a file of 10 rows"):
        reader.row(10)


@pytest.mark.parametrize("compression", ["snappy", "gzip", "zstd", "none"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("nullable", [True, False])
def test_large_columns_are_read_as_streams(tmp_path, monkeypatch, caplog, compression, version, dictionary, nullable):
    """The same as the library reads, whatever the writer chose; texts repeat, compress well, badly, and not at all."""
    rng, path = random.Random(1), tmp_path / "rows.parquet"
    noise = base64.b64encode(rng.randbytes(400_000)).decode()
    texts = ["", "short", noise, "ab" * 300_000, noise[:1000] * 200, noise[1:], "x" * 70_000] * 3
    texts += [f"{n} " * rng.randint(1, 9) for n in range(300)] + [noise, noise]
    if nullable:
        texts[5] = texts[6] = texts[-1] = None
    schema = pa.schema([pa.field("n", pa.int64()), pa.field("text", pa.string(), nullable=nullable)])
    table = pa.table({"n": list(range(len(texts))), "text": texts}, schema)
    parquet.write_table(
        table, path, row_group_size=200, compression=compression, data_page_version=version, use_dictionary=dictionary
    )
    monkeypatch.setattr(parquet_rows, "LARGE", 0)
    reader = RowReader(path, ("text",))
    order = [*range(len(texts)), *(rng.randrange(len(texts)) for _ in range(40))]
    for index in order:
        found = reader.row(index)["text"]
        assert (None if found is None else found.decode()) == texts[index], index
    assert reader.streamed is not None and not caplog.records


def test_what_cannot_be_streamed_is_read_whole_and_told(tmp_path, monkeypatch, caplog):
    path = tmp_path / "rows.parquet"
    table = pa.table({"text": [str(n) for n in range(50)]})
    parquet.write_table(table, path, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"})
    monkeypatch.setattr(parquet_rows, "LARGE", 0)
    reader = RowReader(path, ("text",))
    assert [reader.row(index)["text"] for index in (0, 3, 49, 2)] == ["0", "3", "49", "2"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "values in encoding 7" in caplog.text and "memory of the file's size" in caplog.text


def test_a_page_that_is_cut_off_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    parquet.write_table(pa.table({"text": ["a" * 1000, "b" * 1000]}), path, **plain)
    content = path.read_bytes()
    place = content.index(b"b" * 1000) - 4
    path.write_bytes(content[:place] + b"\xff\xff\xff\x0f" + content[place + 4 :])
    monkeypatch.setattr(parquet_rows, "LARGE", 0)
    reader = RowReader(path, ("text",))
    assert reader.row(0)["text"] == b"a" * 1000
    with pytest.raises(DataError, match="expected a whole Parquet file"):
        reader.row(1)
