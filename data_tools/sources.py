"""Images and captions as people have them -> rows. A new kind of input is a class and a line in SOURCES.

Names inside a container (`00000.tar/000012.jpg`, `part-0.parquet/17`) are labels that do not depend on the machine; where
the picture lies is the row's `place`, which only `Source.read_embedded` understands.
"""

import abc
import codecs
import contextlib
import csv
import errno
import glob
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import stat
import threading
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, NamedTuple

from data_tools.errors import UserError, suggest
from data_tools.foreign_tar import DEVICE, FILE, FOLDER, LINK, Member, read_headers
from data_tools.image import PictureError
from data_tools.parquet_footer import Footer, FooterError, RowGroup, read_footer
from data_tools.tar import TarError

if TYPE_CHECKING:
    import pyarrow

IMAGE_COLUMNS = (
    *("filename", "file_name", "file", "file_path", "filepath", "path", "image", "image_file", "image_name"),
    *("image_path", "image_url", "image_link", "img", "img_path", "img_url", "picture", "url"),
)
CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "sentence", "sentences", "comment", "alt_text", "alttext")
BYTES_COLUMNS = ("image", "image_bytes", "img", "img_bytes", "bytes", "picture", "jpg", "jpeg", "png", "webp")
"""The columns that are taken without --image-column and --caption-column, whatever their case, if just one is there."""

PICTURE_SUFFIXES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
SIDECAR_COLUMNS = (
    *("key", "status", "error", "caption", "captions", "width", "height", "original_width", "original_height"),
    *("sha256", "offset", "size", "source"),
)
"""An input's column of such a name is kept as `source_NAME`."""

MAX_TEXT_CHARACTERS = 100_000
MAX_PICTURE_BYTES = 512 * 2**20
MAX_TEXT_FILE_BYTES = 4 * 2**20
MAX_LINE_BYTES = 16 * 2**20
MAX_COLUMNS = 1000
MAX_FILES = 1_000_000

_DELIMITERS = (",", ";", "\t", "|")
_SURROGATE = re.compile("[\ud800-\udfff]")
_NUL_MARK = "\udc00"  # stands for NUL inside csv.reader, which does not take NUL before Python 3.11
_FLICKR30K_HEADER = re.compile(r"\s*image_name\s*\|\s*comment_number\s*\|\s*comment\s*")
_FLICKR30K_ROW = re.compile(r"([^|]+)\|\s*\d+\s*\|?\s*(.*)", re.DOTALL)
_FLICKR30K_TOKEN = re.compile(r"(.+?)#\d+\t(.*)", re.DOTALL)
_URL = re.compile(r"https?://\S+\Z")
_SPLIT_FILE = re.compile(r"(?:.*/)?([A-Za-z_]+)-\d+-of-\d+[^/]*")
_BATCH_ROWS = 1024
_WINDOW_BYTES = 32 * 2**20
_LARGEST_WINDOW_ROWS = 2**20  # whatever a footer says
_LOOKED_AT_ROWS = 1000
_LOOKED_AT_FILES = 1000
_LARGEST_GROUP = 1000
_NOT_UTF8 = b""  # takes the place of a text that cannot be decoded


class Row(NamedTuple):
    """One image name with one caption. An image with several captions has several rows of the same name.

    `refusal` is why the row cannot be used (one of a few reasons, to count by), or "". `extra` is a JSON object of the
    other columns, whose values fit `Source.extra_columns()`, or "". `place` is where an embedded picture lies, for
    `Source.read_embedded`, or "" for a picture that is to be fetched by its name.
    """

    image: str
    caption: str
    refusal: str
    extra: str = ""
    place: str = ""


class _File(NamedTuple):
    """A file of the input: its path or URL, and a name that is the same on every machine."""

    path: str
    name: str


class _Options(NamedTuple):
    image_column: str | None
    caption_column: str | None
    keep_columns: tuple[str, ...] | None


class Source(abc.ABC):
    """An input that has been opened. Made by `open_source`; it can be pickled, and read by several threads."""

    embedded: bool = False
    """Whether rows may carry places."""

    def __init__(self, input: str, files: Sequence[_File], options: _Options) -> None:
        self._input = input
        self._files = tuple(files)
        self._options = options
        self._forget()

    @classmethod
    def _list_folder(cls, folder: str, kind: str) -> list[_File]:
        """The files of this kind below `folder`. Raises UserError for none, and for the files of several splits."""
        suffixes = [suffix for suffix, source in SOURCES.items() if source is cls and suffix.startswith(".")]
        names = [name for name in _list_files(folder) if _suffix(name) in suffixes]
        if not names:
            raise UserError(f"{folder}: no file of the kind {kind} is here or below. Give its files as a pattern")
        splits = {match[1] for name in names if (match := _SPLIT_FILE.fullmatch(name))}
        if len(splits) > 1:
            pattern = f"{folder.rstrip('/')}/**/{min(splits)}-*"
            raise UserError(f"{folder}: holds the splits {', '.join(sorted(splits))}. Give one, as with '{pattern}'")
        return [_File(f"{folder.rstrip('/')}/{name}", _clean_text(name)) for name in names]

    @abc.abstractmethod
    def identity(self) -> str:
        """SHA-256, in hexadecimal, of what decides the rows; not of paths, times or hosts.

        It covers every byte of tables and captions. Embedded pictures count with their names and sizes only.
        """

    @abc.abstractmethod
    def rows(self) -> Iterator[Row]:
        """The rows in the input's order, in constant memory; the same at each call.

        Raises UserError for input that cannot be read on from some place.
        """

    @abc.abstractmethod
    def extra_columns(self) -> "dict[str, pyarrow.DataType]":
        """The columns of `Row.extra`: string, int64, float64 or bool; what is none of these is JSON text (string)."""

    def read_embedded(self, place: str) -> bytes:
        """The bytes of the picture at a row's `place`; quickest when places ascend.

        Raises PictureError for a picture that is not there whole.
        """
        with self._lock:
            if self._process != os.getpid():  # a file's position must not be shared with the process that forked
                self._opened, self._process = {}, os.getpid()
            return self._read(place)

    def _read(self, place: str) -> bytes:
        raise ValueError(f"{self._input}: rows of this kind have no places, but {place!r} was asked for")

    def _hold(self, number: int, opener: Callable[[contextlib.ExitStack], Any]) -> Any:
        """What `opener` has opened for a file, kept until another file is asked for."""
        if self._opened.get("number") != number:
            if self._opened:
                self._opened["files"].close()
            self._opened = {}
            with contextlib.ExitStack() as files:
                held = opener(files)
                self._opened = {"number": number, "held": held, "files": files.pop_all()}
        return self._opened["held"]

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._opened: dict[str, Any] = {}
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_opened", "_process")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _hash_names(self) -> "hashlib._Hash":
        """A digest to begin an identity with. The name of an only table decides nothing."""
        digest = hashlib.sha256()
        if len(self._files) > 1 or self.embedded:
            digest.update("\n".join(file.name for file in self._files).encode(errors="surrogateescape"))
        return digest

    def _locate(self, file: _File, what: str) -> str:
        """The name of a row that has no other."""
        return what if len(self._files) == 1 else f"{file.name} {what}"


def open_source(
    input: str | Path,
    *,
    kind: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    keep_columns: Sequence[str] | None = None,
) -> Source:
    """Open the table, container, folder or pattern (`{000..099}`, `*`) at a path or an fsspec URL.

    `kind` is a key of SOURCES; without it the suffix, or what lies in the folder, decides. The columns are found by their
    usual names (IMAGE_COLUMNS, CAPTION_COLUMNS) when they are not given. `keep_columns` are the other columns to keep,
    None for all. For tars and folders `image_column` is the extension of the pictures, and `caption_column` that
    of the caption's file or a key of the .json.

    Raises UserError for an input that is not there, is of no known kind, or whose columns are not clear.
    """
    input = os.fspath(input)
    if kind is not None:
        found = next((name for name in (kind, f".{kind}") if name in SOURCES), None)
        if found is None:
            valid = [name.removeprefix(".") for name in SOURCES]
            raise UserError(f"{input}: unknown kind '{kind}'.{suggest(kind, valid)} Valid: {', '.join(valid)}")
        kind = found
    options = _Options(image_column, caption_column, None if keep_columns is None else tuple(keep_columns))
    if _is_folder(input):
        kind = kind or _guess_kind_of_folder(input)
        return SOURCES[kind](input, SOURCES[kind]._list_folder(input, kind), options)
    files = _name_files(_expand(input))
    if kind is None:
        kinds = {_suffix(file.path): file for file in files}
        unknown = [suffix for suffix in kinds if suffix not in SOURCES]
        if unknown:
            valid = ", ".join(SOURCES)
            raise UserError(f"{kinds[unknown[0]].path}: unknown kind of table '{unknown[0]}'. Valid: {valid}")
        if len({SOURCES[suffix] for suffix in kinds}) > 1:
            raise UserError(f"{input}: matches files of several kinds: {', '.join(kinds)}. Give a narrower pattern")
        kind = next(iter(kinds))
    source = SOURCES[kind]
    if kind in (".csv", ".tsv") and image_column is None and caption_column is None:
        source = _recognise_table(files[0]) or source
    packed = [file.path for file in files if file.path.lower().endswith(".gz")]
    if packed and issubclass(source, (TarSource, _ColumnarSource)):
        raise UserError(f"{packed[0]}: pictures inside gzip cannot be reached one by one. Unpack it first")
    return source(input, files, options)


def read_rows(path: str | Path, image_column: str, caption_column: str) -> Iterator[Row]:
    """The rows of the input at `path`, without its other columns. Raises UserError as `open_source` does."""
    return open_source(path, image_column=image_column, caption_column=caption_column, keep_columns=()).rows()


# Paths, patterns and URLs


def _is_url(path: str) -> bool:
    return "://" in path


def _file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Raises UserError for one that is not installed."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: this kind of URL cannot be opened: {error}") from None


@contextlib.contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    """Open a file or URL for reading. Raises UserError where a URL cannot be opened."""
    if not _is_url(path):
        with open(path, "rb") as file:
            yield file
        return
    system, inner = _file_system(path)
    with _refuse_unreachable(path):
        file = system.open(inner, "rb")
    with file:
        yield file


@contextlib.contextmanager
def _refuse_unreachable(url: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each file system of fsspec has errors of its own
        text = " ".join(str(error).split()) or "no reason given"
        raise UserError(f"{url}: cannot be opened ({type(error).__name__}: {text}). Check the URL") from None


@contextlib.contextmanager
def _open_unpacked(file: _File) -> Iterator[BinaryIO]:
    """Open a file, unpacked if its name ends in .gz, with lines that are quick to read."""
    with _open(file.path) as packed:
        try:
            if file.path.lower().endswith(".gz"):
                yield io.BufferedReader(gzip.GzipFile(fileobj=packed), 2**20)
            else:
                yield io.BufferedReader(packed, 2**20) if _is_url(file.path) else packed
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{file.path}: truncated or damaged gzip ({error}). Fetch or pack it again") from None


def _suffix(path: str) -> str:
    """The suffix in lower case, without that of gzip and, in a web address, without what follows '?'."""
    if path.startswith(("http://", "https://")):
        path = path.partition("?")[0].partition("#")[0]
    name = path.rpartition("/")[2].lower().removesuffix(".gz")
    return os.path.splitext(name)[1]


def _is_folder(input: str) -> bool:
    if not _is_url(input):
        return os.path.isdir(input)
    if _suffix(input) or set("*?[{") & set(input):
        return False
    system, inner = _file_system(input)
    with _refuse_unreachable(input):
        return system.isdir(inner)


def _expand(input: str) -> list[str]:
    """The files that a path or pattern names: brace notation in its own order, what `*` and `?` match sorted."""
    if not _is_url(input) and os.path.exists(input):
        return [input]
    patterns = [input]
    if "{" in input:
        import braceexpand

        try:
            patterns = list(itertools.islice(braceexpand.braceexpand(input), MAX_FILES + 1))
        except ValueError as error:
            raise UserError(f"{input}: {error}. Brace notation is {{00000..00099}} or {{train,val}}") from None
    files = list(dict.fromkeys(path for pattern in patterns for path in _match(pattern)))
    if len(files) > MAX_FILES:
        raise UserError(f"{input}: names more than {MAX_FILES} files. Give it in parts")
    if not files:
        raise UserError(f"{input}: no file is named so. Check the path or the pattern")
    absent = [path for path in files if not _is_url(path) and not os.path.isfile(path)]
    if absent == [input]:
        raise UserError(f"{input}: no such file or folder. Check the path")
    if absent:
        raise UserError(f"{input}: {len(absent)} of {len(files)} files are not there (first: {absent[0]})")
    return files


def _match(pattern: str) -> list[str]:
    if pattern.startswith(("http://", "https://")) or not set("*?[") & set(pattern):
        return [pattern]
    if not _is_url(pattern):
        return sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    system, inner = _file_system(pattern)
    with _refuse_unreachable(pattern):
        return sorted(system.unstrip_protocol(path) for path in system.glob(inner))


def _name_files(paths: list[str]) -> list[_File]:
    """Names below the folder that the files have in common."""
    parts = [path.split("/") for path in paths]
    depth = len(os.path.commonprefix([part[:-1] for part in parts]))
    return [_File(path, _clean_text("/".join(part[depth:]))) for path, part in zip(paths, parts, strict=True)]


def _list_files(folder: str) -> Iterator[str]:
    """The files below `folder`, as sorted paths relative to it. A folder that links lead to again is listed once."""
    if not _is_url(folder):
        yield from _walk(folder)
        return
    system, inner = _file_system(folder)
    with _refuse_unreachable(folder):
        found = sorted(system.find(inner))
    yield from (path.removeprefix(inner).lstrip("/") for path in found)


def _walk(root: str) -> Iterator[str]:
    seen = set()
    waiting = [""]  # a stack, the next one last
    while waiting:
        relative = waiting.pop()
        path = os.path.join(root, relative)
        if not os.path.isdir(path):
            yield relative
            continue
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        # Hidden ones are such as .git, .DS_Store and the ._a.jpg that macOS leaves.
        names = sorted((name for name in os.listdir(path) if not name.startswith(".")), key=os.fsencode, reverse=True)
        waiting += (f"{relative}/{name}" if relative else name for name in names)


def _guess_kind_of_folder(folder: str) -> str:
    """What the first files of a folder show it to be. Raises UserError for one that could be several things."""
    names = list(itertools.islice(_list_files(folder), _LOOKED_AT_FILES))
    if "dataset_dict.json" in names:
        splits = sorted({name.partition("/")[0] for name in names if name.endswith("/state.json")})
        raise UserError(
            f"{folder}: holds the splits {', '.join(splits)}. Give one of them, such as {folder}/{splits[0]}"
        )
    if "state.json" in names and "dataset_info.json" in names:
        return ".arrow"
    suffixes = dict.fromkeys(map(_suffix, names))
    kinds = [suffix for suffix in suffixes if suffix in SOURCES and suffix != ".json"]
    if ".tar" in kinds:
        kinds = [".tar"]  # the tables beside tars tell about them
    if any(suffix[1:] in PICTURE_SUFFIXES for suffix in suffixes):
        kinds = ["folder", *(kind for kind in kinds if kind in (".tar", ".parquet", ".arrow"))]
    if len({SOURCES[kind] for kind in kinds}) == 1:
        return kinds[0]
    found = f"could be any of {', '.join(kinds)}" if kinds else "holds nothing that is known"
    raise UserError(f"{folder}: {found}. Give a file or a pattern in it, or the kind, one of: {', '.join(SOURCES)}")


# Columns and captions


def _choose_column(
    where: str, known: Sequence[str], usable: Sequence[str], columns: Sequence[str], asked: str | None, option: str
) -> str:
    """The column asked for, or the only one of `usable` with a known name. Raises UserError, which lists `columns`."""
    listed = f"The columns are: {', '.join(columns)}. Name yours with --image-column and --caption-column"
    if asked is not None:
        if asked not in columns:
            raise UserError(f"{where}: no column '{asked}'.{suggest(asked, columns)} {listed}")
        return asked
    found = [column for column in dict.fromkeys(usable) if _plain_name(column) in known]
    if len(found) == 1:
        return found[0]
    state = f"the {option} could be any of {', '.join(found)}" if found else f"no column is known to hold the {option}"
    raise UserError(f"{where}: {state}. {listed}")


def _plain_name(column: str) -> str:
    return column.strip().lower().replace(" ", "_").replace("-", "_")


def _make_rows(image: Any, captions: Any, extra: str, place: str, location: str) -> Iterator[Row]:
    """A row for each caption. `location` names the row when it has no image name that can be used."""
    refusal = _judge_text(image, "image name")
    if refusal:
        yield Row(_name_row(image, location), "", refusal)
        return
    for caption in _split_captions(captions):
        refusal = _judge_text(caption, "caption")
        yield Row(image, "" if refusal else caption.strip(), refusal, extra, place)


def _name_row(image: Any, location: str) -> str:
    """The image name of a refused row, as far as it is one."""
    usable = isinstance(image, str) and image.strip() and "\0" not in image and len(image) <= MAX_TEXT_CHARACTERS
    return _clean_text(image) if usable else location


def _split_captions(value: Any) -> Sequence[Any]:
    """A list stays one, and so does the JSON text of a list of texts; anything else is the only caption."""
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("[") and text.endswith("]") and len(text) <= MAX_TEXT_CHARACTERS:
            listed = _parse_json(text)
            if isinstance(listed, list) and listed and all(isinstance(entry, str) for entry in listed):
                return listed
    if isinstance(value, list):
        return value or [None]
    return [value]


def _judge_text(text: Any, what: str) -> str:
    """Why a text cannot be used, or ""."""
    if text is None or (isinstance(text, str) and not text.strip()):
        return f"empty {what}"
    if not isinstance(text, str):
        return f"{what} that is not UTF-8 text" if text is _NOT_UTF8 else f"{what} that is not text"
    if len(text) > MAX_TEXT_CHARACTERS:
        return f"{what} of more than {MAX_TEXT_CHARACTERS} characters"
    if "\0" in text:
        return f"{what} with a NUL character"
    return "" if _is_utf8(text) else f"{what} that is not UTF-8 text"


def _is_utf8(text: str) -> bool:
    return text.isascii() or _SURROGATE.search(text) is None


def _clean_text(text: str) -> str:
    """The text with what is no character written as \\uNNNN, so that it can be stored anywhere."""
    return text if _is_utf8(text) else text.encode(errors="backslashreplace").decode()


def _parse_json(text: str | bytes) -> Any:
    """The value, with null for NaN and Infinity, or _NOT_JSON."""
    try:
        return json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return _NOT_JSON


_NOT_JSON = object()


class _ExtraColumns:
    """The columns to keep beside image and caption: their types, learned from all values, and their text in a row."""

    def __init__(self, where: str, keep: tuple[str, ...] | None) -> None:
        self._where = where
        self._keep = keep
        self._kinds: dict[str, set[str]] = {}
        self._plan: dict[str, tuple[str, str]] | None = None

    def observe(self, extra: Mapping[str, Any]) -> None:
        """Take a row's values into account."""
        for name, value in extra.items():
            self.observe_kind(name, None if value is None else _KIND_OF_VALUE.get(type(value), "json"), value)

    def observe_kind(self, name: str, kind: str | None, value: Any = 0) -> None:
        """Take a value, or a whole column of a kind, into account; None is a kind without values."""
        kinds = self._kinds.get(name)
        if kinds is None:
            if self._keep is not None and name not in self._keep:
                return
            kinds = self._kinds[name] = set()
            if len(self._kinds) > MAX_COLUMNS:
                raise UserError(
                    f"{self._where}: more than {MAX_COLUMNS} different columns. Name those to keep with --keep-columns"
                )
        if kind is not None:
            kinds.add("json" if kind == "int64" and not -(2**63) <= value < 2**63 else kind)

    def finish(self, columns: Collection[str] = ()) -> "_ExtraColumns":
        """Settle names and types. Raises UserError for a column to keep that is not there."""
        for name in self._keep or ():
            if name not in self._kinds and name not in columns:
                valid = sorted({*self._kinds, *columns})
                raise UserError(
                    f"{self._where}: no column '{name}' to keep.{suggest(name, valid)} Those that can be kept: "
                    f"{', '.join(valid)}"
                )
        self._plan = {}
        taken = set(SIDECAR_COLUMNS)
        for name in sorted(self._kinds, key=lambda name: name in SIDECAR_COLUMNS):  # the others keep their names
            final = _clean_text(name)
            while not final or final in taken:
                final = f"source_{final}"
            taken.add(final)
            self._plan[name] = (final, _join_kinds(self._kinds[name]))
        self._plan = {name: self._plan[name] for name in self._kinds}
        return self

    def types(self) -> "dict[str, pyarrow.DataType]":
        import pyarrow

        types = {"int64": pyarrow.int64(), "float64": pyarrow.float64(), "bool": pyarrow.bool_()}
        return {name: types.get(kind, pyarrow.string()) for name, kind in self._plan.values()}

    def render(self, extra: Mapping[str, Any]) -> str:
        """The JSON object of a row, without its nulls; "" when nothing is left."""
        rendered = {}
        for name, value in extra.items():
            final, kind = self._plan.get(name, (None, None))
            if final is None or value is None or value is _NOT_UTF8:
                continue
            if kind == "float64":
                value = float(value)
                if not math.isfinite(value):
                    continue
            elif kind in ("string", "json"):
                value = _clean_text(
                    value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
                )
            rendered[final] = value
        return json.dumps(rendered, ensure_ascii=False) if rendered else ""


_KIND_OF_VALUE = {str: "string", bool: "bool", int: "int64", float: "float64"}


def _join_kinds(kinds: set[str]) -> str:
    if len(kinds) == 1:
        return next(iter(kinds))
    return "float64" if kinds == {"int64", "float64"} else "string"


# Tables of text


class _TableSource(Source):
    """Files of lines, each with its own header; the cells are texts."""

    def __init__(self, input: str, files: Sequence[_File], options: _Options) -> None:
        super().__init__(input, files, options)
        self._places(self._files[0], self._read_header(self._files[0]))  # a wrong column is refused at once
        self._extra: _ExtraColumns | None = None

    @abc.abstractmethod
    def _read_header(self, file: _File) -> list[str]: ...

    @abc.abstractmethod
    def _read_cells(self, file: _File) -> Iterator[tuple[int, list[str], str]]:
        """Line number, cells and refusal of each row under the header."""

    def identity(self) -> str:
        digest = self._hash_names()
        for file in self._files:
            with _open(file.path) as stream:
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
                    yield Row(_name_row(image, self._locate(file, f"line {line}")), "", refusal)
                    continue
                extra = extra_columns.render({name: cells[place] for name, place in kept}) if kept else ""
                yield from _make_rows(
                    cells[image_place], cells[caption_place], extra, "", self._locate(file, f"line {line}")
                )
        if undecoded * 10 > count:  # not damage here and there, but another encoding
            raise UserError(
                f"{self._input}: not UTF-8 text in {undecoded} of {count} rows. Convert it, as with `iconv -f latin1 -t utf-8`"
            )

    def _places(self, file: _File, header: list[str]) -> tuple[int, int]:
        image, caption = self._options.image_column, self._options.caption_column
        image = _choose_column(file.path, IMAGE_COLUMNS, header, header, image, "image")
        caption = _choose_column(file.path, CAPTION_COLUMNS, header, header, caption, "caption")
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

    def _learn_extra(self) -> _ExtraColumns:
        if self._extra is None:
            extra = _ExtraColumns(self._input, self._options.keep_columns)
            headers = [self._read_header(file) for file in self._files]
            for header in headers:
                for name, _ in self._kept(header):
                    extra.observe_kind(name, "string")
            self._extra = extra.finish({name for header in headers for name in header})
        return self._extra


_LINE_NOT_UTF8 = "line that is not UTF-8 text"
_LINE_TOO_LONG = f"line of more than {MAX_LINE_BYTES} bytes"


def _read_lines(stream: BinaryIO, digest: Any = None) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines without their ends, None for one that is too long to hold.

    Only line feeds end a line: a caption may hold other separators.
    """
    number = 0
    while line := stream.readline(MAX_LINE_BYTES):
        number += 1
        if digest is not None:
            digest.update(line)
        too_long = len(line) == MAX_LINE_BYTES and not line.endswith(b"\n")
        while len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE_BYTES)
            if digest is not None:
                digest.update(line)
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        yield number, None if too_long else line.removesuffix(b"\n").removesuffix(b"\r")


def _read_text_lines(stream: BinaryIO) -> Iterator[tuple[int, str, str]]:
    """Number, text and refusal of each line that is not empty."""
    for number, line in _read_lines(stream):
        if line is None:
            yield number, "", _LINE_TOO_LONG
        elif line:
            try:
                yield number, line.decode(), ""
            except UnicodeDecodeError:
                yield number, line.decode(errors="surrogateescape"), _LINE_NOT_UTF8


class TsvSource(_TableSource):
    """Tab-separated lines. A quote is a character like any other."""

    _header: ClassVar[tuple[str, ...] | None] = None
    """The columns of a table without a header line."""

    def _read_header(self, file: _File) -> list[str]:
        if self._header is not None:
            return list(self._header)
        with _open_unpacked(file) as stream:
            return _first_line(file, stream).split("\t")

    def _read_cells(self, file: _File) -> Iterator[tuple[int, list[str], str]]:
        with _open_unpacked(file) as stream:
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

    def _read_header(self, file: _File) -> list[str]:
        return ["filename", "caption"]

    def _read_cells(self, file: _File) -> Iterator[tuple[int, list[str], str]]:
        with _open_unpacked(file) as stream:
            for number, text, refusal in _read_text_lines(stream):
                if number == 1 and _FLICKR30K_HEADER.fullmatch(text):
                    continue
                # The published table lacks a bar in one row, which this takes as it is meant.
                match = _FLICKR30K_TOKEN.fullmatch(text) or _FLICKR30K_ROW.fullmatch(text)
                cells = [match[1].strip(), match[2]] if match else []
                yield number, cells, refusal or ("" if match else "line that is not a row of Flickr30k")


class CsvSource(_TableSource):
    """Cells quoted as in RFC 4180, between commas, semicolons, tabs or bars: whichever parts the header as asked."""

    def _read_header(self, file: _File) -> list[str]:
        return self._split_header(file)[1]

    def _split_header(self, file: _File) -> tuple[str, list[str]]:
        with _open_unpacked(file) as stream:
            line = _first_line(file, stream)
        headers = {delimiter: next(csv.reader([line], delimiter=delimiter), []) for delimiter in _DELIMITERS}
        delimiter = max(_DELIMITERS, key=lambda candidate: self._rate_header(headers[candidate]))
        return delimiter, headers[delimiter]

    def _rate_header(self, header: list[str]) -> tuple[int, int]:
        """How many of image and caption it names, then how many columns it has."""
        asked = ((self._options.image_column, IMAGE_COLUMNS), (self._options.caption_column, CAPTION_COLUMNS))
        names = {_plain_name(column) for column in header}
        named = sum(bool(names & {*known}) if name is None else name in header for name, known in asked)
        return named, len(header)

    def _read_cells(self, file: _File) -> Iterator[tuple[int, list[str], str]]:
        csv.field_size_limit(MAX_LINE_BYTES)  # the module's default would end the table at a caption of 128 KiB
        delimiter, _ = self._split_header(file)
        with _open_unpacked(file) as stream:
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
            reader = csv.reader(self._read_pieces(file, text), delimiter=delimiter, strict=True)
            try:
                next(reader, None)
                for cells in filter(None, reader):
                    refusal = ""
                    if not all(map(_is_utf8, cells)):
                        cells = [cell.replace(_NUL_MARK, "\0") for cell in cells]
                        refusal = "" if all(map(_is_utf8, cells)) else _LINE_NOT_UTF8
                    yield reader.line_num, cells, refusal
            except csv.Error as error:
                raise UserError(
                    f"{file.path}: line {reader.line_num}: {error}. Quote cells as in RFC 4180 (a quote inside is "
                    "doubled), or give a .tsv, where quotes mean nothing"
                ) from None
            finally:
                text.detach()  # it would close the stream, which others do

    def _read_pieces(self, file: _File, text: io.TextIOWrapper) -> Iterator[str]:
        while line := text.readline(MAX_LINE_BYTES):
            if len(line) == MAX_LINE_BYTES:
                raise UserError(f"{file.path}: a {_LINE_TOO_LONG}. Is it a CSV?")
            yield line.replace("\0", _NUL_MARK)


def _first_line(file: _File, stream: BinaryIO) -> str:
    line = next(_read_lines(stream), (1, b""))[1]
    try:
        return "" if line is None else line.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file.path}: not UTF-8 text ({error.reason}). Convert it, as with `iconv -f latin1 -t utf-8`"
        ) from None


def _recognise_table(file: _File) -> type[Source] | None:
    """The class of a table without a header as others publish it, known by its first line, else None."""
    with _open_unpacked(file) as stream:
        line = next(_read_lines(stream), (1, b""))[1] or b""
    text = line.decode(errors="replace")
    cells = text.split("\t")
    addresses = [bool(_URL.match(cell)) for cell in cells]
    if _FLICKR30K_HEADER.fullmatch(text):
        return Flickr30kSource
    if addresses == [False, True]:
        return ConceptualCaptionsSource
    return Conceptual12MSource if addresses == [True, False] else None


# Records with fields of any type: JSON in its forms


class _Record(NamedTuple):
    """One picture of the input before its captions are judged; `refusal` is why there are none."""

    image: Any
    captions: Any
    refusal: str
    extra: Mapping[str, Any]
    place: str
    location: str


class _RecordSource(Source):
    """An input whose fields have no declared types: a first pass over it learns them."""

    def __init__(self, input: str, files: Sequence[_File], options: _Options) -> None:
        super().__init__(input, files, options)
        self._learned: tuple[str, _ExtraColumns] | None = None

    @abc.abstractmethod
    def _records(self, digest: Any = None) -> Iterator[_Record]:
        """The records, in order; `digest` is fed with all that decides them."""

    def _learn(self) -> tuple[str, _ExtraColumns]:
        if self._learned is None:
            digest = self._hash_names()
            extra_columns = _ExtraColumns(self._input, self._options.keep_columns)
            for record in self._records(digest):
                extra_columns.observe(record.extra)
            self._learned = digest.hexdigest(), extra_columns.finish()
        return self._learned

    def identity(self) -> str:
        return self._learn()[0]

    def extra_columns(self) -> "dict[str, pyarrow.DataType]":
        return self._learn()[1].types()

    def rows(self) -> Iterator[Row]:
        # Without columns to keep there is nothing to learn first.
        keep = self._options.keep_columns
        extra_columns = _ExtraColumns(self._input, ()).finish() if keep == () else self._learn()[1]
        for image, captions, refusal, extra, place, location in self._records():
            if refusal:
                yield Row(_name_row(image, location), "", refusal, "", place)
            else:
                yield from _make_rows(image, captions, extra_columns.render(extra), place, location)


class JsonLinesSource(_RecordSource):
    """A JSON object a line. A line that is none is a refused row."""

    def __init__(self, input: str, files: Sequence[_File], options: _Options) -> None:
        super().__init__(input, files, options)
        fields: dict[str, None] = {}
        for _, _, value in itertools.islice(self._values(self._files[:1]), _LOOKED_AT_ROWS):
            fields |= dict.fromkeys(value if isinstance(value, dict) else ())
        names, path = list(fields), self._files[0].path
        self._image = _choose_column(path, IMAGE_COLUMNS, names, names, options.image_column, "image")
        self._caption = _choose_column(path, CAPTION_COLUMNS, names, names, options.caption_column, "caption")

    def _values(self, files: Iterable[_File], digest: Any = None) -> Iterator[tuple[_File, int, Any]]:
        for file in files:
            with _open_unpacked(file) as stream:
                for number, line in _read_lines(stream, digest):
                    if line is None:
                        yield file, number, _LINE_TOO_LONG
                    elif line.strip():
                        yield file, number, _parse_json(line)

    def _records(self, digest: Any = None) -> Iterator[_Record]:
        for file, number, value in self._values(self._files, digest):
            location = self._locate(file, f"line {number}")
            if isinstance(value, dict):
                image, captions = value.pop(self._image, None), value.pop(self._caption, None)
                yield _Record(image, captions, "", value, "", location)
            else:
                refusal = value if value is _LINE_TOO_LONG else "line that is not a JSON object"
                yield _Record(None, None, refusal, {}, "", location)


class CocoSource(_RecordSource):
    """COCO's captions: a JSON object with `images` and `annotations`, which is held in memory."""

    def _records(self, digest: Any = None) -> Iterator[_Record]:
        image_column = self._options.image_column or "file_name"
        caption_column = self._options.caption_column or "caption"
        for file in self._files:
            images, captions = self._load(file, caption_column, digest)
            for number, image in enumerate(images):
                location = self._locate(file, f"image {number}")
                if not isinstance(image, dict):
                    yield _Record(None, None, "image entry that is not an object", {}, "", location)
                    continue
                extra = {name: value for name, value in image.items() if name != image_column}
                found = captions.pop(_as_key(image.get("id")), None)
                yield _Record(image.get(image_column), found, "" if found else "no caption", extra, "", location)
            for key in captions:
                location = self._locate(file, f"image_id {key}")
                yield _Record(None, None, "captions of an image that is not listed", {}, "", location)

    def _load(self, file: _File, caption_column: str, digest: Any) -> tuple[list[Any], dict[str, list[Any]]]:
        """The images, and the captions by their image's key."""
        with _open_unpacked(file) as stream:
            data = stream.read()
        if digest is not None:
            digest.update(data)
        content = _parse_json(data)
        images, annotations = (
            content.get(part) if isinstance(content, dict) else None for part in ("images", "annotations")
        )
        if not isinstance(images, list) or not isinstance(annotations, list):
            raise UserError(
                f"{file.path}: not COCO's captions: a JSON object with the lists 'images' and 'annotations'. Is it "
                "whole? One JSON object a line is a .jsonl"
            )
        captions: dict[str, list[Any]] = {}
        for entry in annotations:
            entry = entry if isinstance(entry, dict) else {}
            captions.setdefault(_as_key(entry.get("image_id")), []).append(entry.get(caption_column))
        if captions and not any(text for listed in captions.values() for text in listed):
            raise UserError(f"{file.path}: no annotation has a '{caption_column}'. Give the captions' file")
        return images, captions


def _as_key(value: Any) -> str:
    return json.dumps(value)


class FolderSource(_RecordSource):
    """Pictures in folders, each with its caption beside it: `a.jpg` with `a.txt` (one caption) or `a.json`, or both."""

    embedded = True

    @classmethod
    def _list_folder(cls, folder: str, kind: str) -> list[_File]:
        if _is_url(folder):
            raise UserError(f"{folder}: a folder of pictures is read from a disk only. Give a table of their URLs")
        return []

    def __init__(self, input: str, files: Sequence[_File], options: _Options) -> None:
        if files:
            raise UserError(f"{input}: not a folder")
        super().__init__(input, files, options)

    def _records(self, digest: Any = None) -> Iterator[_Record]:
        suffixes = PICTURE_SUFFIXES if self._options.image_column is None else (self._options.image_column,)
        found = False
        for name in _list_files(self._input):
            stem, suffix = os.path.splitext(name)
            if suffix[1:].lower() not in suffixes:
                continue
            found = True
            yield self._read_record(name, stem, digest)
        if not found:
            raise UserError(f"{self._input}: no picture is here or below (.{', .'.join(suffixes)})")

    def _read_record(self, name: str, stem: str, digest: Any) -> _Record:
        texts: dict[str, bytes] = {}
        size, refusal = self._look_up(name)
        for extension in dict.fromkeys(("txt", "json", self._options.caption_column or "txt")):
            try:
                texts[extension] = _read_regular(os.path.join(self._input, f"{stem}.{extension}"), MAX_TEXT_FILE_BYTES)
            except FileNotFoundError:
                pass
            except (PictureError, PermissionError) as error:
                refusal = (
                    refusal or f"caption file: {error.args[0] if isinstance(error, PictureError) else 'unreadable'}"
                )
        if digest is not None:
            digest.update(repr((name, size, refusal, sorted(texts.items()))).encode())
        captions, extra = _read_captions(self._input, texts, self._options.caption_column)
        refusal = refusal or ("no caption" if captions is None else "")
        return _Record(name, captions, refusal, extra, name if _is_utf8(name) else "", _clean_text(name))

    def _look_up(self, name: str) -> tuple[int, str]:
        """The picture's size in bytes, and why it is none, or ""."""
        try:
            status = os.stat(os.path.join(self._input, name))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP, errno.EACCES):
                raise
            return 0, "link that leads nowhere"
        return status.st_size, "" if stat.S_ISREG(status.st_mode) else "not a file"

    def _read(self, place: str) -> bytes:
        try:
            return _read_regular(os.path.join(self._input, place), MAX_PICTURE_BYTES)
        except FileNotFoundError:
            raise PictureError("missing picture", place) from None
        except PermissionError as error:
            raise PictureError("unreadable picture", f"{place}: {error.strerror}") from None


def _read_regular(path: str, limit: int) -> bytes:
    """The bytes of a regular file. Raises PictureError for anything else and for one that is too large."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe of that name must not hang us
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise PictureError("not a file", path)
        if status.st_size > limit:
            raise PictureError("file too large", f"{path} has {status.st_size} bytes, at most {limit} are read")
        return file.read()


def _read_captions(where: str, texts: Mapping[str, bytes], asked: str | None) -> tuple[Any, dict[str, Any]]:
    """The captions that stand beside a picture, None for none, and the other fields of its .json.

    `texts` has the files by extension. Without `asked` the list `captions` of the .json comes first, then the .txt,
    then whichever field of the .json has a usual name.
    """
    fields = _parse_json(texts["json"]) if "json" in texts else {}
    fields = fields if isinstance(fields, dict) else {}
    if asked is not None:
        captions = _decode_text(texts[asked]) if asked in texts and asked != "json" else fields.get(asked)
        return captions, {name: value for name, value in fields.items() if name != asked}
    known = [name for name in fields if _plain_name(name) in CAPTION_COLUMNS]
    extra = {name: value for name, value in fields.items() if name not in ("caption", "captions")}
    if isinstance(fields.get("captions"), list) and fields["captions"]:
        return fields["captions"], extra
    if "txt" in texts:
        return _decode_text(texts["txt"]), extra
    if len(known) > 1:
        raise UserError(
            f"{where}: the caption could be any of {', '.join(known)} in the .json files. Name one with --caption-column"
        )
    extra = {name: value for name, value in extra.items() if name not in known}
    return (fields[known[0]] if known else None), extra


def _decode_text(data: bytes) -> Any:
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError:
        return _NOT_UTF8


# Tars


class TarSource(_RecordSource):
    """Tars of samples, as webdataset reads them: members `KEY.jpg`, `KEY.txt`, `KEY.json` that stand together.

    Planning reads headers, and the data of captions only. A key may hold dots and may come again: the row is then named
    `TAR/KEY.jpg#2`. Links, devices and samples that are not whole are refused rows.
    """

    embedded = True

    def _records(self, digest: Any = None) -> Iterator[_Record]:
        for number, file in enumerate(self._files):
            used: set[str] = set()
            for record in self._read_tar(number, file, digest):
                name, again = record.location, 1
                while name in used:
                    again += 1
                    name = f"{record.location}#{again}"
                used.add(name)
                yield record._replace(image=name, location=name)

    def _read_tar(self, number: int, file: _File, digest: Any) -> Iterator[_Record]:
        """The records of one tar; `location` is the name, not yet made unique."""
        with _open(file.path) as stream:
            group: dict[str, dict[str, Member]] = {}  # members by key (up to the last dot) and extension
            group_start = None
            count = 0
            try:
                for member in read_headers(stream):
                    if digest is not None:
                        digest.update(repr((member.name, member.kind, member.size)).encode())
                    if member.kind != FILE:
                        if member.kind != FOLDER:
                            yield self._refuse(
                                f"{file.name}/{member.name}",
                                _REFUSED_MEMBERS.get(member.kind, "unknown kind of member"),
                            )
                        continue
                    folder, _, name = member.name.rpartition("/")
                    key, _, extension = member.name.rpartition(".")
                    extension = extension.lower()
                    if name.startswith(".") or "." not in name or not self._is_wanted(extension):
                        continue
                    start = (folder, name.partition(".")[0])
                    crowded = count >= _LARGEST_GROUP and key not in group
                    if start != group_start or extension in group.get(key, ()) or crowded:
                        yield from self._make_records(number, file, stream, group, digest)
                        group, group_start, count = {}, start, 0
                    group.setdefault(key, {})[extension] = member
                    count += 1
            except TarError as error:
                yield from self._make_records(number, file, stream, group, digest)
                if digest is not None:
                    digest.update(repr((error.text, error.offset)).encode())
                yield self._refuse(f"{file.name}/byte {error.offset}", "tar that is damaged or cut short from here on")
            else:
                yield from self._make_records(number, file, stream, group, digest)

    def _is_wanted(self, extension: str) -> bool:
        asked = (self._options.image_column, self._options.caption_column)
        return extension in PICTURE_SUFFIXES or extension in ("txt", "json") or extension in asked

    def _is_picture(self, extension: str) -> bool:
        asked = self._options.image_column
        return extension in PICTURE_SUFFIXES if asked is None else extension == asked

    def _refuse(self, location: str, refusal: str) -> _Record:
        return _Record(None, None, refusal, {}, "", _clean_text(location))

    def _make_records(
        self, number: int, file: _File, stream: BinaryIO, group: dict[str, dict[str, Member]], digest: Any
    ) -> Iterator[_Record]:
        """The samples among members whose names agree up to their first dot.

        A dot may be part of the key (`example.com_1.jpg`) or of the extension (`a.jpg` with `a.mask.png`, `a.img.jpg` with
        `a.txt`): a picture takes the captions of its own key, or all of the group's when it is the only one.
        """
        pictures = {key: [name for name in members if self._is_picture(name)] for key, members in group.items()}
        only = sum(map(len, pictures.values())) == 1
        whole = {key for key, found in pictures.items() if found and len(found) < len(group[key])}
        for key, members in group.items():
            part_of_other = any(key.startswith(f"{other}.") for other in whole if other != key)
            found = pictures[key]
            if not found:
                if not only and not part_of_other:
                    yield self._refuse(f"{file.name}/{key}", "captions without a picture")
                continue
            if part_of_other:
                continue
            picture = members[found[0]]
            location = f"{file.name}/{picture.name}"
            if len(found) > 1:
                yield self._refuse(location, "several pictures of one key: name an extension with --image-column")
                continue
            texts = {name: text for other in group.values() for name, text in other.items()} if only else {}
            texts |= members
            texts = {name: text for name, text in texts.items() if not self._is_picture(name)}
            place = f"{number}:{picture.data_offset}:{picture.size}"
            yield self._read_record(file, stream, texts, digest)._replace(place=place, location=_clean_text(location))

    def _read_record(self, file: _File, stream: BinaryIO, texts: Mapping[str, Member], digest: Any) -> _Record:
        if any(member.size > MAX_TEXT_FILE_BYTES for member in texts.values()):
            return self._refuse("", f"caption file of more than {MAX_TEXT_FILE_BYTES} bytes")
        contents = {}
        for name in texts:
            stream.seek(texts[name].data_offset)
            contents[name] = stream.read(texts[name].size)
            if digest is not None:
                digest.update(contents[name])
        captions, extra = _read_captions(file.path, contents, self._options.caption_column)
        return _Record(None, captions, "no caption" if captions is None else "", extra, "", "")

    def _read(self, place: str) -> bytes:
        number, offset, size = map(int, place.split(":"))
        path = self._files[number].path
        if size > MAX_PICTURE_BYTES:
            raise PictureError("file too large", f"{size} bytes in {path}, at most {MAX_PICTURE_BYTES} are read")
        stream = self._hold(number, lambda files: files.enter_context(_open(path)))
        stream.seek(offset)
        data = stream.read(size)
        if len(data) < size:
            raise PictureError("tar cut short", f"{path} has {len(data)} of {size} bytes at {offset}")
        return data


_REFUSED_MEMBERS = {LINK: "link in a tar", DEVICE: "device in a tar"}


# Columns of types: parquet and Arrow, with pictures inside or names of pictures


class _ColumnarSource(Source):
    """Files of typed columns. The pictures are a column of bytes, or of Hugging Face's struct{bytes, path}, or names."""

    def __init__(self, input: str, files: Sequence[_File], options: _Options) -> None:
        super().__init__(input, files, options)
        self._extra: _ExtraColumns | None = None
        schema = self._load_schema(self._files[0])
        self._image, self._caption = self._choose_columns(self._files[0], schema)
        self.embedded = _holds_pictures(schema.field(self._image).type)
        self._image_is_struct = self.embedded and not _is_bytes(schema.field(self._image).type)

    @abc.abstractmethod
    def _read_schema(self, file: _File) -> "pyarrow.Schema": ...

    def _load_schema(self, file: _File) -> "pyarrow.Schema":
        """A file's schema, whose names can be read. Raises UserError."""
        with _refuse_damaged(file):
            schema = self._read_schema(file)
            _check_names(schema)
            return schema

    @abc.abstractmethod
    def _read_batches(
        self, file: _File, columns: list[str]
    ) -> "Iterator[tuple[str, int, pyarrow.RecordBatch, Sequence[bool]]]":
        """The batches of a file with those columns, and the image column or its paths.

        Each with the name of its group, its first row's place in the group, and which of its rows hold a picture.
        """

    @abc.abstractmethod
    def _read_cell(self, number: int, group: int, row: int) -> Any:
        """The image column's value at a row of a group of file `number`."""

    def extra_columns(self) -> "dict[str, pyarrow.DataType]":
        return self._learn_extra().types()

    def rows(self) -> Iterator[Row]:
        extra_columns = self._learn_extra()
        for number, file in enumerate(self._files):
            kept = self._kept(file)
            row = 0
            with _refuse_damaged(file):
                for group, start, batch, present in self._read_batches(file, [self._caption, *kept]):
                    captions = _to_values(batch.column(self._caption))
                    names = self._read_names(batch)
                    extras = zip(*(_to_values(batch.column(name)) for name in kept), strict=True) if kept else ()
                    rendered = (extra_columns.render(dict(zip(kept, values, strict=True))) for values in extras)
                    for place, (caption, name, is_present) in enumerate(zip(captions, names, present, strict=True)):
                        extra = next(rendered, "")
                        label = f"{file.name}/{row}"
                        row += 1
                        if is_present:
                            yield from _make_rows(label, caption, extra, f"{number}/{group}/{start + place}", label)
                        elif name is None and self.embedded:
                            yield Row(label, "", "no picture", extra)
                        else:
                            yield from _make_rows(
                                name, caption, extra, "", label if self.embedded else self._locate(file, f"row {row}")
                            )

    def _read_names(self, batch: "pyarrow.RecordBatch") -> list[Any]:
        """The names of pictures, for rows without their bytes."""
        import pyarrow.compute

        if self._image not in batch.schema.names:
            return [None] * batch.num_rows
        column = batch.column(self._image)
        if not self.embedded:
            return _to_values(column)
        if not self._image_is_struct or column.type.get_field_index("path") < 0:
            return [None] * batch.num_rows
        return _to_values(pyarrow.compute.struct_field(column, "path"))

    def _read(self, place: str) -> bytes:
        number, group, row = map(int, place.split("/"))
        try:
            value = self._read_cell(number, group, row)
        except _arrow_errors() as error:
            if getattr(error, "errno", None):
                raise
            raise PictureError("damaged container", f"{self._files[number].path}: {_one_line(error)}") from None
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise PictureError("no picture", f"{self._files[number].path} at {place}")
        return data

    def _choose_columns(self, file: _File, schema: "pyarrow.Schema") -> tuple[str, str]:
        import pyarrow

        kinds = {field.name: field.type for field in schema}
        structs = [name for name, kind in kinds.items() if pyarrow.types.is_struct(kind) and _holds_pictures(kind)]
        bytes_columns = [name for name, kind in kinds.items() if _is_bytes(kind) and _plain_name(name) in BYTES_COLUMNS]
        texts = [name for name, kind in kinds.items() if _kind_of_type(kind) == "string" and not _is_list(kind)]
        captions = [name for name, kind in kinds.items() if _holds_texts(kind)]
        asked = self._options.image_column
        pictures = structs or bytes_columns
        known = [_plain_name(name) for name in pictures] or IMAGE_COLUMNS
        image = _choose_column(file.path, known, pictures or texts, list(kinds), asked, "image")
        caption = _choose_column(
            file.path, CAPTION_COLUMNS, captions, list(kinds), self._options.caption_column, "caption"
        )
        if not _holds_pictures(kinds[image]) and not _holds_texts(kinds[image]):
            raise UserError(f"{file.path}: the column '{image}' of {kinds[image]} holds neither pictures nor names")
        if not _holds_texts(kinds[caption]):
            raise UserError(
                f"{file.path}: the column '{caption}' of {kinds[caption]} holds no texts nor lists of texts"
            )
        return image, caption

    def _kept(self, file: _File) -> list[str]:
        """The other columns that a file has and that can be kept."""
        keep = self._options.keep_columns
        return [
            field.name
            for field in self._checked_schema(file)
            if field.name not in (self._image, self._caption)
            and (keep is None or field.name in keep)
            and _kind_of_type(field.type) is not None
        ]

    def _checked_schema(self, file: _File) -> "pyarrow.Schema":
        """A file's schema. Raises UserError when it lacks a column, or has it of another sort, than the first file."""
        schema = self._load_schema(file)
        for name in (self._image, self._caption):
            if schema.get_field_index(name) < 0:
                raise UserError(
                    f"{file.path}: no column '{name}', which {self._files[0].path} has, or it is there twice"
                )
        kind = schema.field(self._image).type
        if _holds_pictures(kind) != self.embedded or (self.embedded and _is_bytes(kind) == self._image_is_struct):
            raise UserError(f"{file.path}: the column '{self._image}' is {kind}, unlike that of {self._files[0].path}")
        return schema

    def _learn_extra(self) -> _ExtraColumns:
        if self._extra is None:
            extra = _ExtraColumns(self._input, self._options.keep_columns)
            others: dict[str, None] = {}
            if self._options.keep_columns != ():
                for file in self._files:
                    schema = self._checked_schema(file)
                    others |= dict.fromkeys((self._image, self._caption))
                    for name in self._kept(file):
                        kind = _kind_of_type(schema.field(name).type)
                        extra.observe_kind(name, None if kind == "null" else kind)
            self._extra = extra.finish(others)
        return self._extra


class ParquetSource(_ColumnarSource):
    """Parquet, streamed by row groups and pages: planning does not read the column of pictures."""

    def _read_schema(self, file: _File) -> "pyarrow.Schema":
        with contextlib.ExitStack() as files:
            return _open_parquet(file, files).schema_arrow

    def _picture_leaf(self) -> str:
        return f"{self._image}.bytes" if self._image_is_struct else self._image

    def _read_batches(self, file: _File, columns: list[str]) -> "Iterator[tuple[str, int, Any, Sequence[bool]]]":
        # Columns that are not there, such as the paths of a struct without them, are passed over.
        columns = [*columns, *([f"{self._image}.path"] if self._image_is_struct else [])]
        with contextlib.ExitStack() as files:
            parquet = _open_parquet(file, files)
            for group, facts in enumerate(_read_parquet_footer(file).row_groups):
                chunk = facts.chunks.get(self._picture_leaf())
                nulls = None if chunk is None else chunk.nulls
                known = not self.embedded or nulls in (0, facts.rows)
                wanted = columns if known and self.embedded else [*columns, self._picture_leaf()]
                size = _BATCH_ROWS if known else self._window_rows(facts)
                start = 0
                for batch in parquet.iter_batches(size, row_groups=[group], columns=wanted):
                    present = [self.embedded and nulls == 0] * batch.num_rows
                    if not known:
                        present = self._read_pictures(batch).is_valid().to_pylist()
                    yield str(group), start, batch, present
                    start += batch.num_rows

    def _read_pictures(self, batch: "pyarrow.RecordBatch") -> "pyarrow.Array":
        import pyarrow.compute

        column = batch.column(self._image)
        return pyarrow.compute.struct_field(column, "bytes") if self._image_is_struct else column

    def _window_rows(self, group: RowGroup) -> int:
        """As many rows as have about 32 MiB of pictures."""
        chunk = group.chunks.get(self._picture_leaf())
        unpacked_bytes = 0 if chunk is None else chunk.unpacked_bytes
        return max(1, min(group.rows, _WINDOW_BYTES * group.rows // max(1, unpacked_bytes), _LARGEST_WINDOW_ROWS))

    def _read_cell(self, number: int, group: int, row: int) -> Any:
        held = self._hold(number, lambda files: self._open_window(self._files[number], files))
        if held.group != group or row < held.start:
            size = self._window_rows(held.row_groups[group])
            held.begin(group, held.parquet.iter_batches(size, row_groups=[group], columns=[self._picture_leaf()]))
        while row >= held.start + len(held.pictures):
            held.go_on(self._read_pictures)
        return held.pictures[row - held.start].as_py()

    def _open_window(self, file: _File, files: contextlib.ExitStack) -> "_ParquetWindow":
        return _ParquetWindow(_open_parquet(file, files), _read_parquet_footer(file).row_groups)

    def identity(self) -> str:
        """Beside the names: the footers, and the stored bytes of every column but the pictures."""
        digest = self._hash_names()
        for file in self._files:
            footer = _read_parquet_footer(file)
            digest.update(footer.data)
            with _open(file.path) as stream:
                for group in footer.row_groups:
                    for path, chunk in group.chunks.items():
                        if not self.embedded or path != self._picture_leaf():
                            _hash_range(digest, stream, chunk.start, chunk.stored_bytes)
        return digest.hexdigest()


class _ParquetWindow:
    """A run of decoded pictures in a row group, which moves forward. After damage it stays where it was."""

    def __init__(self, parquet: Any, row_groups: Sequence[RowGroup]) -> None:
        self.parquet = parquet
        self.row_groups = row_groups
        self.group, self.start = -1, 0
        self.pictures: Any = ()
        self._batches: Iterator[Any] = iter(())
        self._damage: dict[int, tuple[int, Exception]] = {}

    def begin(self, group: int, batches: Iterator[Any]) -> None:
        self.group, self.start, self.pictures, self._batches = group, 0, (), batches

    def go_on(self, read_pictures: Callable[[Any], Any]) -> None:
        end = self.start + len(self.pictures)
        if self.group in self._damage and end >= self._damage[self.group][0]:
            raise self._damage[self.group][1]  # reading the group up to here for each of its rows would take for ever
        try:
            batch = next(self._batches, None)
            if batch is None:
                raise OSError("the row group has fewer rows than were counted")
            pictures = read_pictures(batch)
        except _arrow_errors() as error:
            self._damage[self.group] = (end, error)
            raise
        self.start, self.pictures = end, pictures


class ArrowSource(_ColumnarSource):
    """Arrow streams and files, as Hugging Face's `save_to_disk` writes them. They are mapped into memory, not read."""

    @classmethod
    def _list_folder(cls, folder: str, kind: str) -> list[_File]:
        state = os.path.join(folder, "state.json")
        if _is_url(folder) or not os.path.isfile(state):
            return super()._list_folder(folder, kind)
        try:
            names = [entry["filename"] for entry in json.loads(Path(state).read_bytes())["_data_files"]]
            if not names or any("/" in name or name.startswith(".") for name in names):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{state}: does not list the dataset's .arrow files. Save the dataset again") from None
        absent = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
        if absent:
            raise UserError(f"{folder}: {len(absent)} of {len(names)} files are missing (first: {absent[0]})")
        return [_File(os.path.join(folder, name), name) for name in names]

    def _read_schema(self, file: _File) -> "pyarrow.Schema":
        with contextlib.ExitStack() as files, _refuse_damaged(file):
            return _open_arrow(file, files)[0]

    def _read_batches(self, file: _File, columns: list[str]) -> "Iterator[tuple[str, int, Any, Sequence[bool]]]":
        with contextlib.ExitStack() as files:
            _, batches = _open_arrow(file, files)
            for group, batch in enumerate(batches):
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    part = batch.select([*columns, self._image]).slice(start, _BATCH_ROWS)
                    for column in part.columns:
                        _check_array(column)
                    present: Sequence[bool] = [False] * part.num_rows
                    if self.embedded:
                        present = self._read_pictures(part.column(self._image)).is_valid().to_pylist()
                    yield str(group), start, part, present

    def _read_pictures(self, column: "pyarrow.Array") -> "pyarrow.Array":
        import pyarrow.compute

        return pyarrow.compute.struct_field(column, "bytes") if self._image_is_struct else column

    def _read_cell(self, number: int, group: int, row: int) -> Any:
        batches, images = self._hold(number, lambda files: (_open_arrow(self._files[number], files)[1], []))
        while len(images) <= group:  # only the places of the buffers are read here, not the pictures
            batch = next(batches, None)
            images.append(None if batch is None else _check_pictures(batch.column(self._image)))
        if images[group] is None:
            raise OSError("the batch is damaged")
        return self._read_pictures(images[group].slice(row, 1))[0].as_py()

    def identity(self) -> str:
        """Beside the names: the values of every column, but only the sizes of the pictures."""
        digest = self._hash_names()
        for file in self._files:
            with _refuse_damaged(file), contextlib.ExitStack() as files:
                schema, batches = _open_arrow(file, files)
                digest.update(str(schema.remove_metadata()).encode())
                for batch in batches:
                    digest.update(b"%d\n" % batch.num_rows)
                    for name, column in zip(schema.names, batch.columns, strict=True):
                        _hash_array(digest, column, self.embedded and name == self._image)
        return digest.hexdigest()


def _open_parquet(file: _File, files: contextlib.ExitStack) -> Any:
    """Raises UserError for a file that is not whole parquet."""
    import pyarrow.parquet

    stream = files.enter_context(_open(file.path)) if _is_url(file.path) else file.path
    with _refuse_damaged(file):
        # Neither option reads a whole column chunk into memory: a row group may have gigabytes of pictures.
        return files.enter_context(pyarrow.parquet.ParquetFile(stream, buffer_size=2**20, pre_buffer=False))


def _read_parquet_footer(file: _File) -> Footer:
    with _open(file.path) as stream:
        try:
            return read_footer(stream)
        except FooterError as error:
            raise UserError(f"{file.path}: truncated or damaged ({error}). Fetch or write it again") from None


def _open_arrow(file: _File, files: contextlib.ExitStack) -> tuple[Any, Iterator[Any]]:
    """The schema and the batches of an Arrow stream, or of an Arrow file."""
    import pyarrow

    if _is_url(file.path):
        raise UserError(f"{file.path}: .arrow files are read from a disk only. Fetch it, or give parquet")
    stream = files.enter_context(pyarrow.memory_map(file.path))
    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    if is_file:
        reader = pyarrow.ipc.open_file(stream)
        return reader.schema, map(reader.get_batch, range(reader.num_record_batches))
    reader = files.enter_context(pyarrow.ipc.open_stream(stream))
    return reader.schema, iter(reader)


def _arrow_errors() -> tuple[type[Exception], ...]:
    import pyarrow

    return (pyarrow.ArrowException, OSError, UnicodeDecodeError)  # the last for the name of a column


@contextlib.contextmanager
def _refuse_damaged(file: _File) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not isinstance(error, _arrow_errors()) or getattr(error, "errno", None):
            raise
        raise UserError(f"{file.path}: truncated or damaged ({_one_line(error)}). Fetch or write it again") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _hash_range(digest: Any, stream: BinaryIO, start: int, size: int) -> None:
    stream.seek(start)
    while size and (chunk := stream.read(min(size, 2**20))):
        digest.update(chunk)
        size -= len(chunk)


def _hash_array(digest: Any, array: "pyarrow.Array", is_picture: bool) -> None:
    """The array's buffers as they are stored; of a picture's bytes only the offsets."""
    import pyarrow

    if is_picture and pyarrow.types.is_struct(array.type):
        _hash_array(digest, array.is_valid(), False)
        for place in range(array.type.num_fields):
            _hash_array(digest, array.field(place), array.type.field(place).name == "bytes")
        return
    for buffer in array.buffers()[: 2 if is_picture else None]:
        digest.update(b"-" if buffer is None else b"%d:" % buffer.size)
        if buffer is not None:
            digest.update(buffer)


def _check_names(fields: "Iterable[pyarrow.Field]") -> None:
    """Raise UnicodeDecodeError for a name that is not UTF-8: pyarrow decodes a name only when it is used."""
    import pyarrow

    for field in fields:
        if field.name and pyarrow.types.is_nested(field.type):
            _check_names(map(field.type.field, range(field.type.num_fields)))


def _check_array(array: "pyarrow.Array") -> None:
    """Check what Arrow believes when it maps a file: a damaged offset would read outside of it."""
    import pyarrow

    kind = array.type
    if pyarrow.types.is_struct(kind):
        array.validate()
        for place in range(kind.num_fields):
            _check_array(array.field(place))
        return
    if pyarrow.types.is_string(kind):
        array = array.view(pyarrow.binary())  # texts are judged one by one
    elif pyarrow.types.is_large_string(kind):
        array = array.view(pyarrow.large_binary())
    array.validate(full=True)


def _check_pictures(array: "pyarrow.Array") -> "pyarrow.Array | None":
    try:
        _check_array(array)
    except _arrow_errors():
        return None
    return array


def _to_values(array: "pyarrow.Array") -> list[Any]:
    """Python values; times, decimals and the like as text, and _NOT_UTF8 where a text cannot be decoded."""
    import pyarrow

    kind = array.type
    if pyarrow.types.is_temporal(kind) or pyarrow.types.is_decimal(kind):
        try:
            array = array.cast(pyarrow.string())
        except pyarrow.ArrowException:
            return [str(value) if value.is_valid else None for value in array]
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        return [_to_value(value) for value in array]


def _to_value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return _NOT_UTF8


def _is_bytes(kind: "pyarrow.DataType") -> bool:
    import pyarrow

    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _is_list(kind: "pyarrow.DataType") -> bool:
    import pyarrow

    return pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)


def _holds_pictures(kind: "pyarrow.DataType") -> bool:
    import pyarrow

    if pyarrow.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _is_bytes(kind.field(place).type)
    return _is_bytes(kind)


def _holds_texts(kind: "pyarrow.DataType") -> bool:
    import pyarrow

    if _is_list(kind):
        kind = kind.value_type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def _kind_of_type(kind: "pyarrow.DataType") -> str | None:
    """How a column is kept: string, int64, float64, bool, json or null; None for bytes, which are not."""
    import pyarrow

    types = pyarrow.types
    if isinstance(kind, pyarrow.ExtensionType):
        return _kind_of_type(kind.storage_type)
    if types.is_dictionary(kind):
        return _kind_of_type(kind.value_type)
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return None
    if types.is_nested(kind):
        inner = [kind.field(place).type for place in range(kind.num_fields)]
        return None if any(_kind_of_type(part) is None for part in inner) else "json"
    if types.is_null(kind):
        return "null"
    if types.is_boolean(kind):
        return "bool"
    if types.is_floating(kind):
        return "float64"
    if types.is_integer(kind):
        return "json" if types.is_uint64(kind) else "int64"
    return "string"


SOURCES: dict[str, type[Source]] = {
    ".tsv": TsvSource,
    ".csv": CsvSource,
    ".jsonl": JsonLinesSource,
    ".ndjson": JsonLinesSource,
    ".json": CocoSource,
    ".token": Flickr30kSource,
    ".parquet": ParquetSource,
    ".arrow": ArrowSource,
    ".tar": TarSource,
    "folder": FolderSource,
    "coco": CocoSource,
    "flickr30k": Flickr30kSource,
    "cc3m": ConceptualCaptionsSource,
    "cc12m": Conceptual12MSource,
    "webdataset": TarSource,
}
"""By suffix, or by a name for `--kind`."""
