"""Footers of parquet: what pyarrow says of whole ones is the oracle, and damaged ones are refused."""

import io

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.parquet_footer import FooterError, read_footer


def write(rows: int = 30, **options) -> bytes:
    images = [
        None if k % 4 == 0 else {"bytes": None if k % 3 == 0 else b"x" * k, "path": f"{k}.jpg"} for k in range(rows)
    ]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {
        "image": pyarrow.array(images, kind),
        "caption": [[f"a {k}", None] for k in range(rows)],
        "score": [k / 3 for k in range(rows)],
        "flag": [k % 2 == 0 for k in range(rows)],
    }
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer, row_group_size=7, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("options", [{}, {"write_statistics": False}, {"use_dictionary": False, "version": "1.0"}])
@pytest.mark.parametrize("rows", [0, 1, 30, 200])
def test_facts_are_those_of_pyarrow(rows, options):
    data = write(rows, **options)
    metadata = pyarrow.parquet.ParquetFile(io.BytesIO(data)).metadata
    footer = read_footer(io.BytesIO(data))
    assert data.endswith(footer.data + data[-8:]) and len(footer.row_groups) == metadata.num_row_groups
    for number, group in enumerate(footer.row_groups):
        expected = metadata.row_group(number)
        assert group.rows == expected.num_rows and len(group.chunks) == expected.num_columns
        for column in map(expected.column, range(expected.num_columns)):
            chunk = group.chunks[column.path_in_schema]
            start = column.dictionary_page_offset or column.data_page_offset
            nulls = column.statistics.null_count if column.statistics is not None else None
            assert chunk == (start, column.total_compressed_size, column.total_uncompressed_size, nulls)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=5), st.integers(0, 10**6))
def test_damaged_footers_are_refused_or_say_what_lies_in_the_file(changes, cut):
    data = bytearray(WHOLE)
    size = int.from_bytes(data[-8:-4], "little")
    for place, value in changes:
        data[len(data) - 8 - size + place % (size + 8)] = value
    data = data[: len(data) - cut % 20] if cut % 3 == 0 else data
    try:
        footer = read_footer(io.BytesIO(data))
    except FooterError as error:
        assert str(error)
        return
    for group in footer.row_groups:
        assert all(0 <= chunk.start <= chunk.start + chunk.stored_bytes <= len(data) for chunk in group.chunks.values())


WHOLE = write()


@pytest.mark.parametrize(
    "data",
    [b"", b"PAR1", b"PAR1PAR1", b"\xff\xff\xff\x7fPAR1", b"\x02\0\0\0PAR1", b"\x19" * 5000 + b"\x88\x13\0\0PAR1"],
)
def test_what_is_no_footer_is_refused(data):
    with pytest.raises(FooterError):
        read_footer(io.BytesIO(data))
