"""Tables of images and captions -> rows. A new kind of input is a function that yields rows and a line in SOURCES."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from data_tools.errors import UserError, suggest

_DELIMITERS = (",", ";", "\t", "|")


class Row(NamedTuple):
    """One image name with one caption; `refusal` is why the caption cannot be used, or ""."""

    image: str
    caption: str
    refusal: str


def read_rows(path: str | Path, image_column: str, caption_column: str) -> Iterator[Row]:
    """Read the rows of the table at `path` in order, by the function that SOURCES has for its suffix.

    Captions lose the white space around them. Raises UserError for an unknown suffix, a column that is not there (it
    lists those that are), text that is not UTF-8 and broken quoting.
    """
    path = Path(path)
    read = SOURCES.get(path.suffix.lower())
    if read is None:
        raise UserError(f"{path}: unknown kind of table '{path.suffix}'. Valid: {', '.join(SOURCES)}")
    return read(path, image_column, caption_column)


def read_tsv(path: Path, image_column: str, caption_column: str) -> Iterator[Row]:
    """Tab-separated lines with a header. A quote is a character like any other."""
    lines = _read_lines(path)
    header = next(lines, "").split("\t")
    yield from _pick_columns(path, header, (line.split("\t") for line in lines if line), image_column, caption_column)


def read_csv(path: Path, image_column: str, caption_column: str) -> Iterator[Row]:
    """Cells quoted as in RFC 4180, between commas, semicolons, tabs or bars: whichever parts the header as asked."""
    header_line = next(_read_lines(path), "")
    headers = {delimiter: next(csv.reader([header_line], delimiter=delimiter), []) for delimiter in _DELIMITERS}
    wanted = {image_column, caption_column}
    delimiter = max(_DELIMITERS, key=lambda candidate: (wanted <= {*headers[candidate]}, len(headers[candidate])))
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            next(reader, None)
            yield from _pick_columns(path, headers[delimiter], filter(None, reader), image_column, caption_column)
        except csv.Error as error:
            raise UserError(
                f"{path}: line {reader.line_num}: {error}. Quote cells as in RFC 4180 (a quote inside is doubled), or "
                "give a .tsv, where quotes mean nothing"
            ) from None
        except UnicodeDecodeError as error:
            raise _refuse_encoding(path, error) from None


def _read_lines(path: Path) -> Iterator[str]:
    """Lines without their ends; only line feeds end a line (a caption may hold other separators)."""
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        try:
            for line in file:
                yield line.removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise _refuse_encoding(path, error) from None


def _refuse_encoding(path: Path, error: UnicodeDecodeError) -> UserError:
    return UserError(f"{path}: not UTF-8 text ({error.reason}). Convert it, as with `iconv -f latin1 -t utf-8`")


def _pick_columns(
    path: Path, header: list[str], rows: Iterator[list[str]], image_column: str, caption_column: str
) -> Iterator[Row]:
    for column in (image_column, caption_column):
        if column not in header:
            raise UserError(
                f"{path}: no column '{column}'.{suggest(column, header)} The columns are: {', '.join(header)}. "
                "Name yours with --image-column and --caption-column"
            )
    image_place, caption_place = header.index(image_column), header.index(caption_column)
    for cells in rows:
        if len(cells) != len(header):
            image = cells[image_place] if image_place < len(cells) else ""
            yield Row(image, "", f"row of {len(cells)} cells under a header of {len(header)}")
        else:
            caption = cells[caption_place].strip()
            yield Row(cells[image_place], caption, "" if caption else "empty caption")


SOURCES: dict[str, Callable[[Path, str, str], Iterator[Row]]] = {
    ".tsv": read_tsv,
    ".csv": read_csv,
}
