"""Tables as people have them: quotes, delimiters, missing cells, wrong columns."""

import pytest

from data_tools.errors import UserError
from data_tools.sources import Row, read_rows


@pytest.fixture
def read(tmp_path):
    def read(name: str, content: str | bytes, columns=("filename", "caption")) -> list[Row]:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(read_rows(path, *columns))

    return read


def test_quotes_in_a_tsv_are_characters(read):
    rows = read("t.tsv", 'filename\tcaption\na.jpg\ta 6" nail\nb.jpg\t"quoted"\nc.jpg\t"open, and\nd.jpg\tlast')
    assert [row.caption for row in rows] == ['a 6" nail', '"quoted"', '"open, and', "last"]


def test_a_tsv_may_have_windows_line_ends_a_mark_and_odd_separators(read):
    rows = read("t.tsv", b"\xef\xbb\xbffilename\tcaption\r\na.jpg\tone\xe2\x80\xa8two\r\n\r\nb.jpg\t  three \r\n")
    assert rows == [Row("a.jpg", "one\u2028two", ""), Row("b.jpg", "three", "")]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_csv_is_parted_by_what_its_header_has(read, delimiter):
    lines = [["id", "caption", "filename"], ["1", '"a dog, a cat; a ""b|ox""\nand more"', "a.jpg"], ["2", "x", "b.jpg"]]
    rows = read("t.csv", "\n".join(delimiter.join(line) for line in lines))
    assert rows == [Row("a.jpg", 'a dog, a cat; a "b|ox"\nand more', ""), Row("b.jpg", "x", "")]


@pytest.mark.parametrize(("name", "delimiter"), [("t.tsv", "\t"), ("t.csv", ",")])
def test_rows_without_a_caption_are_refused_with_a_reason(read, name, delimiter):
    lines = [["filename", "caption"], ["a.jpg", " "], ["a.jpg"], ["a.jpg", "x", "y"], ["a.jpg", "x"]]
    rows = read(name, "\n".join(delimiter.join(line) for line in lines))
    assert [(row.image, row.refusal) for row in rows] == [
        ("a.jpg", "empty caption"),
        ("a.jpg", "row of 1 cells under a header of 2"),
        ("a.jpg", "row of 3 cells under a header of 2"),
        ("a.jpg", ""),
    ]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        (
            "t.tsv",
            "filename\tcaptions\n",
            "no column 'caption'. Did you mean 'captions'? The columns are: filename, capt",
        ),
        ("t.csv", "image,text\n", "no column 'filename'. The columns are: image, text. Name yours with --image-column"),
        ("t.tsv", "", "no column 'filename'"),
        ("t.csv", "", "no column 'filename'"),
        ("t.xml", "", "unknown kind of table '.xml'. Valid: .tsv, .csv"),
        ("t.tsv", b"filename\tcaption\na\tcaf\xe9\n", "not UTF-8 text"),
        ("t.csv", b"filename,caption\na,caf\xe9\n", "not UTF-8 text"),
        (
            "t.csv",
            'filename,caption\na,b\nc,"open\nd,e\n',
            "line 4: unexpected end of data. Quote cells as in RFC 4180",
        ),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(read, name, content, text):
    with pytest.raises(UserError) as caught:
        read(name, content)
    assert text in str(caught.value) and "\n" not in str(caught.value)
