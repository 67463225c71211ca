"""Tables of text: TSV, CSV, and the tables of Flickr30k and Conceptual Captions."""

import abc
import csv
import io
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO, ClassVar

from data_tools.errors import UserError
from data_tools.inputs import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    LINE_TOO_LONG,
    MAX_LINE_BYTES,
    ExtraColumns,
    InputFile,
    InputOptions,
    Row,
    Source,
    choose_column,
    is_utf8,
    make_rows,
    name_row,
    open_input,
    open_unpacked,
    plain_name,
    read_lines,
)

if TYPE_CHECKING:
    import pyarrow

_DELIMITERS = (",", ";", "\t", "|")
_NUL_MARK = "\udc00"  # stands for NUL inside csv.reader, which does not take NUL before Python 3.11
_FLICKR30K_HEADER = re.compile(r"\s*image_name\s*\|\s*comment_number\s*\|\s*comment\s*")
_FLICKR30K_ROW = re.compile(r"([^|]+)\|\s*\d+\s*\|?\s*(.*)", re.DOTALL)
_FLICKR30K_TOKEN = re.compile(r"(.+?)#\d+\t(.*)", re.DOTALL)
_URL = re.compile(r"https?://\S+\Z")


class _TableSource(Source):
    """Files of lines, each with its own header; the cells are texts."""

    def __init__(self, input: str, files: Sequence[InputFile], options: InputOptions) -> None:
        super().__init__(input, files, options)
        self._places(self._files[0], self._read_header(self._files[0]))  # a wrong column is refused at once
        self._extra: ExtraColumns | None = None

    @abc.abstractmethod
    def _read_header(self, file: InputFile) -> list[str]: ...

    @abc.abstractmethod
    def _read_cells(self, file: InputFile) -> Iterator[tuple[int, list[str], str]]:
        """Line number, cells and refusal of each row under the header."""

    def identity(self) -> str:
        digest = self._hash_names()
        for file in self._files:
            with open_input(file.path) as stream:
                while chunk := stream.read(2**20):
                    digest.update(chunk)
        return digest.hexdigest()

    def extra_columns(self) -> "dict[str, pyarrow.DataType]":
        return self._learn_extra().types()

    def rows(self) -> Iterator[Row]:
        extra_columns = self._learn_extra()
        count = undecoded = 0
        for file in self._files:
            header = self._read_header(file)
            image_place, caption_place = self._places(file, header)
            kept = self._kept(header)
            for line, cells, refusal in self._read_cells(file):
                count += 1
                if not refusal and len(cells) != len(header):
                    refusal = f"row of {len(cells)} cells under a header of {len(header)}"
                if refusal:
                    undecoded += refusal is _LINE_NOT_UTF8
                    image = cells[image_place] if image_place < len(cells) else ""
                    yield Row(name_row(image, self._locate(file, f"line {line}")), "", refusal)
                    continue
                extra = extra_columns.render({name: cells[place] for name, place in kept}) if kept else ""
                yield from make_rows(
                    cells[image_place], cells[caption_place], extra, "", self._locate(file, f"line {line}")
                )
        if undecoded * 10 > count:  # not damage here and there, but another encoding
            raise UserError(
                f"{self._input}: not UTF-8 text in {undecoded} of {count} rows. Convert it, as with `iconv -f latin1 -t utf-8`"
            )

    def _places(self, file: InputFile, header: list[str]) -> tuple[int, int]:
        image, caption = self._options.image_column, self._options.caption_column
        image = choose_column(file.path, IMAGE_COLUMNS, header, header, image, "image")
        caption = choose_column(file.path, CAPTION_COLUMNS, header, header, caption, "caption")
        return header.index(image), header.index(caption)

    def _kept(self, header: list[str]) -> list[tuple[str, int]]:
        used = self._places(self._files[0], header)
        keep = self._options.keep_columns
        places = {name: place for place, name in reversed(list(enumerate(header)))}
        return [
            (name, places[name])
            for name in dict.fromkeys(header)
            if places[name] not in used and (keep is None or name in keep)
        ]

    def _learn_extra(self) -> ExtraColumns:
        if self._extra is None:
            extra = ExtraColumns(self._input, self._options.keep_columns)
            headers = [self._read_header(file) for file in self._files]
            for header in headers:
                for name, _ in self._kept(header):
                    extra.observe_kind(name, "string")
            self._extra = extra.finish({name for header in headers for name in header})
        return self._extra


_LINE_NOT_UTF8 = "line that is not UTF-8 text"


def _read_text_lines(stream: BinaryIO) -> Iterator[tuple[int, str, str]]:
    """Number, text and refusal of each line that is not empty."""
    for number, line in read_lines(stream):
        if line is None:
            yield number, "", LINE_TOO_LONG
        elif line:
            try:
                yield number, line.decode(), ""
            except UnicodeDecodeError:
                yield number, line.decode(errors="surrogateescape"), _LINE_NOT_UTF8


class TsvSource(_TableSource):
    """Tab-separated lines. A quote is a character like any other."""

    _header: ClassVar[tuple[str, ...] | None] = None
    """The columns of a table without a header line."""

    def _read_header(self, file: InputFile) -> list[str]:
        if self._header is not None:
            return list(self._header)
        with open_unpacked(file) as stream:
            return _first_line(file, stream).split("\t")

    def _read_cells(self, file: InputFile) -> Iterator[tuple[int, list[str], str]]:
        with open_unpacked(file) as stream:
            lines = _read_text_lines(stream)
            if self._header is None:
                next(lines, None)
            for number, text, refusal in lines:
                yield number, text.split("\t"), refusal


class ConceptualCaptionsSource(TsvSource):
    """CC3M as Google gives it out: a caption, a tab and an address a line, without a header."""

    _header = ("caption", "url")


class Conceptual12MSource(TsvSource):
    """CC12M as Google gives it out: an address, a tab and a caption a line, without a header."""

    _header = ("url", "caption")


class Flickr30kSource(_TableSource):
    """Flickr30k's tables: results.csv (`image_name| comment_number| comment`) or NAME.token (`a.jpg#0<tab>caption`)."""

    def _read_header(self, file: InputFile) -> list[str]:
        return ["filename", "caption"]

    def _read_cells(self, file: InputFile) -> Iterator[tuple[int, list[str], str]]:
        with open_unpacked(file) as stream:
            for number, text, refusal in _read_text_lines(stream):
                if number == 1 and _FLICKR30K_HEADER.fullmatch(text):
                    continue
                # The published table lacks a bar in one row, which this takes as it is meant.
                match = _FLICKR30K_TOKEN.fullmatch(text) or _FLICKR30K_ROW.fullmatch(text)
                cells = [match[1].strip(), match[2]] if match else []
                yield number, cells, refusal or ("" if match else "line that is not a row of Flickr30k")


class CsvSource(_TableSource):
    """Cells quoted as in RFC 4180, between commas, semicolons, tabs or bars: whichever parts the header as asked."""

    def _read_header(self, file: InputFile) -> list[str]:
        return self._split_header(file)[1]

    def _split_header(self, file: InputFile) -> tuple[str, list[str]]:
        with open_unpacked(file) as stream:
            line = _first_line(file, stream)
        headers = {delimiter: next(csv.reader([line], delimiter=delimiter), []) for delimiter in _DELIMITERS}
        delimiter = max(_DELIMITERS, key=lambda candidate: self._rate_header(headers[candidate]))
        return delimiter, headers[delimiter]

    def _rate_header(self, header: list[str]) -> tuple[int, int]:
        """How many of image and caption it names, then how many columns it has."""
        asked = ((self._options.image_column, IMAGE_COLUMNS), (self._options.caption_column, CAPTION_COLUMNS))
        names = {plain_name(column) for column in header}
        named = sum(bool(names & {*known}) if name is None else name in header for name, known in asked)
        return named, len(header)

    def _read_cells(self, file: InputFile) -> Iterator[tuple[int, list[str], str]]:
        csv.field_size_limit(MAX_LINE_BYTES)  # the module's default would end the table at a caption of 128 KiB
        delimiter, _ = self._split_header(file)
        with open_unpacked(file) as stream:
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
            reader = csv.reader(self._read_pieces(file, text), delimiter=delimiter, strict=True)
            try:
                next(reader, None)
                for cells in filter(None, reader):
                    refusal = ""
                    if not all(map(is_utf8, cells)):
                        cells = [cell.replace(_NUL_MARK, "\0") for cell in cells]
                        refusal = "" if all(map(is_utf8, cells)) else _LINE_NOT_UTF8
                    yield reader.line_num, cells, refusal
            except csv.Error as error:
                raise UserError(
                    f"{file.path}: line {reader.line_num}: {error}. Quote cells as in RFC 4180 (a quote inside is "
                    "doubled), or give a .tsv, where quotes mean nothing"
                ) from None
            finally:
                text.detach()  # it would close the stream, which others do

    def _read_pieces(self, file: InputFile, text: io.TextIOWrapper) -> Iterator[str]:
        while line := text.readline(MAX_LINE_BYTES):
            if len(line) == MAX_LINE_BYTES:
                raise UserError(f"{file.path}: a {LINE_TOO_LONG}. Is it a CSV?")
            yield line.replace("\0", _NUL_MARK)


def _first_line(file: InputFile, stream: BinaryIO) -> str:
    line = next(read_lines(stream), (1, b""))[1]
    try:
        return "" if line is None else line.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file.path}: not UTF-8 text ({error.reason}). Convert it, as with `iconv -f latin1 -t utf-8`"
        ) from None


def recognise_table(file: InputFile) -> type[Source] | None:
    """The class of a table without a header as others publish it, known by its first line, else None."""
    with open_unpacked(file) as stream:
        line = next(read_lines(stream), (1, b""))[1] or b""
    text = line.decode(errors="replace")
    cells = text.split("\t")
    addresses = [bool(_URL.match(cell)) for cell in cells]
    if _FLICKR30K_HEADER.fullmatch(text):
        return Flickr30kSource
    if addresses == [False, True]:
        return ConceptualCaptionsSource
    return Conceptual12MSource if addresses == [True, False] else None
