"""What every kind of input shares: Row and Source, paths and URLs, the choice of columns, captions, other columns."""

import abc
import codecs
import contextlib
import glob
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import threading
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from data_tools.errors import UserError, suggest

if TYPE_CHECKING:
    import pyarrow

IMAGE_COLUMNS = (
    *("filename", "file_name", "file", "file_path", "filepath", "path", "image", "image_file", "image_name"),
    *("image_path", "image_url", "image_link", "img", "img_path", "img_url", "picture", "url"),
)
CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "sentence", "sentences", "comment", "alt_text", "alttext")
"""The columns that are taken without --image-column and --caption-column, whatever their case, if just one is there."""
PICTURE_SUFFIXES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
SIDECAR_COLUMNS = (
    *("key", "status", "error", "caption", "captions", "width", "height", "original_width", "original_height"),
    *("sha256", "offset", "size", "source"),
)
"""An input's column of such a name is kept as `source_NAME`."""
MAX_TEXT_CHARACTERS = 100_000
MAX_LINE_BYTES = 16 * 2**20
MAX_COLUMNS = 1000
MAX_FILES = 1_000_000
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPLIT_FILE = re.compile(r"(?:.*/)?([A-Za-z_]+)-\d+-of-\d+[^/]*")
NOT_UTF8 = b""  # takes the place of a text that cannot be decoded
LINE_TOO_LONG = f"line of more than {MAX_LINE_BYTES} bytes"


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


class InputFile(NamedTuple):
    """A file of the input: its path or URL, and a name that is the same on every machine."""

    path: str
    name: str


class InputOptions(NamedTuple):
    image_column: str | None
    caption_column: str | None
    keep_columns: tuple[str, ...] | None


class Source(abc.ABC):
    """An input that has been opened. Made by `open_source`; it can be pickled, and read by several threads."""

    embedded: bool = False
    """Whether rows may carry places."""

    reads_by_group: bool = False
    """Whether places are GROUP/ROW, and one can only be read with what precedes it in its group."""

    def __init__(self, input: str, files: Sequence[InputFile], options: InputOptions) -> None:
        self._input = input
        self._files = tuple(files)
        self._options = options
        self._forget()

    def __str__(self) -> str:
        return self._input

    @classmethod
    def list_folder(cls, folder: str, suffixes: Sequence[str]) -> list[InputFile]:
        """The files with these suffixes below `folder`. Raises UserError for none, and for those of several splits."""
        names = [name for name in list_files(folder) if suffix_of(name) in suffixes]
        if not names:
            raise UserError(
                f"{folder}: no {' or '.join(suffixes) or 'known'} file is here or below. Give the files as a pattern"
            )
        splits = {match[1] for name in names if (match := _SPLIT_FILE.fullmatch(name))}
        if len(splits) > 1:
            pattern = f"{folder.rstrip('/')}/**/{min(splits)}-*"
            raise UserError(f"{folder}: holds the splits {', '.join(sorted(splits))}. Give one, as with '{pattern}'")
        return [InputFile(f"{folder.rstrip('/')}/{name}", clean_text(name)) for name in names]

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

    def _locate(self, file: InputFile, what: str) -> str:
        """The name of a row that has no other."""
        return what if len(self._files) == 1 else f"{file.name} {what}"


def is_url(path: str) -> bool:
    return "://" in path


def _file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Raises UserError for one that is not installed."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: this kind of URL cannot be opened: {error}") from None


@contextlib.contextmanager
def open_input(path: str) -> Iterator[BinaryIO]:
    """Open a file or URL for reading. Raises UserError where a URL cannot be opened."""
    if not is_url(path):
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
def open_unpacked(file: InputFile) -> Iterator[BinaryIO]:
    """Open a file, unpacked if its name ends in .gz, with lines that are quick to read."""
    with open_input(file.path) as packed:
        try:
            if file.path.lower().endswith(".gz"):
                yield io.BufferedReader(gzip.GzipFile(fileobj=packed), 2**20)
            else:
                yield io.BufferedReader(packed, 2**20) if is_url(file.path) else packed
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{file.path}: truncated or damaged gzip ({error}). Fetch or pack it again") from None


def suffix_of(path: str) -> str:
    """The suffix in lower case, without that of gzip and, in a web address, without what follows '?'."""
    if path.startswith(("http://", "https://")):
        path = path.partition("?")[0].partition("#")[0]
    name = path.rpartition("/")[2].lower().removesuffix(".gz")
    return os.path.splitext(name)[1]


def is_folder(input: str) -> bool:
    if not is_url(input):
        return os.path.isdir(input)
    if suffix_of(input) or set("*?[{") & set(input):
        return False
    system, inner = _file_system(input)
    with _refuse_unreachable(input):
        return system.isdir(inner)


def expand_pattern(input: str) -> list[str]:
    """The files that a path or pattern names: brace notation in its own order, what `*` and `?` match sorted."""
    if not is_url(input) and os.path.exists(input):
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
    absent = [path for path in files if not is_url(path) and not os.path.isfile(path)]
    if absent == [input]:
        raise UserError(f"{input}: no such file or folder. Check the path")
    if absent:
        raise UserError(f"{input}: {len(absent)} of {len(files)} files are not there (first: {absent[0]})")
    return files


def _match(pattern: str) -> list[str]:
    if pattern.startswith(("http://", "https://")) or not set("*?[") & set(pattern):
        return [pattern]
    if not is_url(pattern):
        return sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    system, inner = _file_system(pattern)
    with _refuse_unreachable(pattern):
        return sorted(system.unstrip_protocol(path) for path in system.glob(inner))


def name_files(paths: list[str]) -> list[InputFile]:
    """Names below the folder that the files have in common."""
    parts = [path.split("/") for path in paths]
    depth = len(os.path.commonprefix([part[:-1] for part in parts]))
    return [InputFile(path, clean_text("/".join(part[depth:]))) for path, part in zip(paths, parts, strict=True)]


def list_files(folder: str) -> Iterator[str]:
    """The files below `folder`, as sorted paths relative to it. A folder that links lead to again is listed once."""
    if not is_url(folder):
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


def choose_column(
    where: str, known: Sequence[str], usable: Sequence[str], columns: Sequence[str], asked: str | None, option: str
) -> str:
    """The column asked for, or the only one of `usable` with a known name. Raises UserError, which lists `columns`."""
    listed = f"The columns are: {', '.join(columns)}. Name yours with --image-column and --caption-column"
    if asked is not None:
        if asked not in columns:
            raise UserError(f"{where}: no column '{asked}'.{suggest(asked, columns)} {listed}")
        return asked
    found = [column for column in dict.fromkeys(usable) if plain_name(column) in known]
    if len(found) == 1:
        return found[0]
    state = f"the {option} could be any of {', '.join(found)}" if found else f"no column is known to hold the {option}"
    raise UserError(f"{where}: {state}. {listed}")


def plain_name(column: str) -> str:
    return column.strip().lower().replace(" ", "_").replace("-", "_")


def make_rows(image: Any, captions: Any, extra: str, place: str, location: str) -> Iterator[Row]:
    """A row for each caption. `location` names the row when it has no image name that can be used."""
    refusal = _judge_text(image, "image name")
    if refusal:
        yield Row(name_row(image, location), "", refusal)
        return
    for caption in _split_captions(captions):
        refusal = _judge_text(caption, "caption")
        yield Row(image, "" if refusal else caption.strip(), refusal, extra, place)


def name_row(image: Any, location: str) -> str:
    """The image name of a refused row, as far as it is one."""
    usable = isinstance(image, str) and image.strip() and "\0" not in image and len(image) <= MAX_TEXT_CHARACTERS
    return clean_text(image) if usable else location


def _split_captions(value: Any) -> Sequence[Any]:
    """A list stays one, and so does the JSON text of a list of texts; anything else is the only caption."""
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("[") and text.endswith("]") and len(text) <= MAX_TEXT_CHARACTERS:
            listed = parse_json(text)
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
        return f"{what} that is not UTF-8 text" if text is NOT_UTF8 else f"{what} that is not text"
    if len(text) > MAX_TEXT_CHARACTERS:
        return f"{what} of more than {MAX_TEXT_CHARACTERS} characters"
    if "\0" in text:
        return f"{what} with a NUL character"
    return "" if is_utf8(text) else f"{what} that is not UTF-8 text"


def is_utf8(text: str) -> bool:
    return text.isascii() or _SURROGATE.search(text) is None


def clean_text(text: str) -> str:
    """The text with what is no character written as \\uNNNN, so that it can be stored anywhere."""
    return text if is_utf8(text) else text.encode(errors="backslashreplace").decode()


def parse_json(text: str | bytes) -> Any:
    """The value, with null for NaN and Infinity, or _NOT_JSON."""
    try:
        return json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return _NOT_JSON


_NOT_JSON = object()


class ExtraColumns:
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

    def finish(self, columns: Collection[str] = ()) -> "ExtraColumns":
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
            final = clean_text(name)
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
            if final is None or value is None or value is NOT_UTF8:
                continue
            if kind == "float64":
                value = float(value)
                if not math.isfinite(value):
                    continue
            elif kind in ("string", "json"):
                value = clean_text(
                    value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
                )
            rendered[final] = value
        return json.dumps(rendered, ensure_ascii=False) if rendered else ""


_KIND_OF_VALUE = {str: "string", bool: "bool", int: "int64", float: "float64"}


def _join_kinds(kinds: set[str]) -> str:
    if len(kinds) == 1:
        return next(iter(kinds))
    return "float64" if kinds == {"int64", "float64"} else "string"


def read_lines(stream: BinaryIO, digest: Any = None) -> Iterator[tuple[int, bytes | None]]:
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
