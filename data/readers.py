"""
Opening text files: finding them, decoding them, reading their rows, and reporting what is wrong with them. Shared by
prepare.py and data/curate.py. An error names the file and the line; nothing is guessed silently.

Reads   .txt .md .csv .tsv .json .jsonl .parquet, also .gz and .zst. A byte order mark takes precedence over --encoding.
        pyarrow and zstandard are imported only where they are needed.
"""
import atexit
import codecs
import contextlib
import csv
import glob
import gzip
import io
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

from data.chats import to_chat, to_preference
from data.tinyworld import make_world

KINDS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json",
         ".parquet": "parquet"}
PROSE = {".txt", ".text", ".md", ".rst"}  # with KINDS, the files that are used of a folder; a glob can name any file
PIECE = 1 << 20                           # characters handled at a time
SPOOLED = set()                           # files that hold a copy of standard input


class Source(NamedTuple):
    path: Path
    kind: str                  # text, csv, json, parquet, topics (pydoc's), world; for curate.py also html, warc
    split: str | None = None   # train or val where the dataset has its own split, else decided per document

    @property
    def name(self):
        return "-" if self.path in SPOOLED else self.path.as_posix()


class Piece(NamedTuple):
    text: str                  # a document, or a part of a long one
    last: bool                 # the document ends here
    key: str | None = None     # what decides the split, if not the text itself
    dropped: str | None = None # why there is no document here


# ---- which files

def spooled():
    """A file with a copy of standard input, because it is read several times. Removed when the process ends."""
    with tempfile.NamedTemporaryFile(prefix="stdin", delete=False) as file:    # in TMPDIR
        path = Path(file.name)
        atexit.register(path.unlink, missing_ok=True)
        shutil.copyfileobj(sys.stdin.buffer, file)
    SPOOLED.add(path)
    return path


def find_files(names, fetch, kinds=KINDS):
    """
    The Sources behind the command line: files, folders, 'globs', URLs (downloaded by `fetch`), - for standard input. In
    a fixed order, each once. FileNotFoundError holds the first name that is none of these.
    """
    paths = []
    for text in names:
        path = Path(text).expanduser()
        if text == "-":
            paths.append(spooled())
        elif "://" in text:
            paths.append(fetch(text))
        elif path.is_dir():
            paths += files_in(path, kinds)
        elif path.exists():
            paths.append(path)
        elif matches := sorted(glob.glob(str(path), recursive=True)):
            paths += [Path(match) for match in matches if os.path.isfile(match)]
        else:
            raise FileNotFoundError(text)
    unique = {path.resolve(): path for path in reversed(paths)}   # a file that is named twice is read once
    return [Source(path, kind_of(path, kinds)) for path in reversed(unique.values())]


def kind_of(path, kinds=KINDS):
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in (".gz", ".zst")]
    if path in SPOOLED:        # JSON Lines begin with an object, JSON with an array of objects
        with open(path, "rb") as file:
            return "json" if re.match(rb"(\xef\xbb\xbf)?\s*(\[\s*)?\{", file.read(1 << 16)) else "text"
    return kinds.get(suffixes[-1], "text") if suffixes else "text"


def files_in(folder, kinds=KINDS):
    everything = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    wanted = PROSE | kinds.keys()
    chosen = [path for path in everything if {s.lower() for s in path.suffixes} & wanted]
    if not chosen:
        raise SystemExit(f"{folder}: {len(everything)} files, none of them {' '.join(sorted(wanted))}; "
                         f"other names can be given as a glob: '{folder}/**/*.tex'")
    if len(chosen) < len(everything):
        print(f"{folder}: {len(chosen)} files; {len(everything) - len(chosen)} of other types skipped")
    return chosen


# ---- open them

def optional(module, path):
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        raise SystemExit(f"{path}: reading it needs another package: pip install {module.split('.')[0]}") from None


def open_bytes(path):
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return optional("zstandard", path).open(path, "rb")
    return open(path, "rb")


def open_text(path, encoding="utf-8", newline=None):
    """Text of a file. A byte order mark takes precedence over `encoding`; undecodable bytes become lone surrogates."""
    with open_bytes(path) as file:
        start = file.read(4)
    if start.startswith(codecs.BOM_UTF8):
        encoding = "utf-8-sig"
    elif start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    return io.TextIOWrapper(open_bytes(path), encoding=encoding, errors="surrogateescape", newline=newline)


def known_encoding(name):
    """Refuse an --encoding that Python does not have, and its codecs that are not for text, such as hex and zip."""
    try:
        "a".encode(name)
    except (LookupError, UnicodeError):
        raise SystemExit(f"--encoding={name} is not a text encoding of Python; try latin-1, cp1252 or "
                         "utf-16-le") from None


def check_zst(path):
    """zstandard reads a truncated file without an error, so decompress it once and look for the last frame's end."""
    zstandard, frame = optional("zstandard", path), None
    with open(path, "rb") as file:
        while block := file.read(PIECE):
            while block:
                frame = zstandard.ZstdDecompressor().decompressobj() if frame is None or frame.eof else frame
                frame.decompress(block)
                block = frame.unused_data
    if frame and not frame.eof:
        raise EOFError("the last frame has no end")


@contextlib.contextmanager
def plain_errors(path):
    """Turn the many exceptions of damaged files into one line that names the file and what to do."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SystemExit(f"{path}: the compressed file is cut short or damaged ({error}); fetch it again") from None
    except UnicodeError as error:
        raise SystemExit(f"{path}: {error}; give the right encoding with --encoding=NAME") from None
    except csv.Error as error:
        raise SystemExit(f"{path}: {error} (an open quote?)") from None
    except Exception as error:
        if type(error).__name__ in ("ZstdError", "ArrowInvalid"):   # of packages that may not be installed
            raise SystemExit(f"{path}: damaged, or not what its name says ({error}); fetch it again") from None
        raise


# ---- what is wrong with a text

def fault(text):
    """(what makes a text unusable, its position): NUL or a lone surrogate. None if there is neither."""
    if (at := text.find("\0")) >= 0:
        return "NUL character (a binary file? UTF-16 without byte order mark? then --encoding=utf-16-le)", at
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:   # how surrogateescape keeps an undecodable byte
            return f"byte 0x{code - 0xDC00:02X} is not UTF-8 (Latin-1? then --encoding=latin-1)", error.start
        return f"lone surrogate U+{code:04X}", error.start
    return None


def check_text(path, encoding):
    """Read a text file once before it is used. Returns its first fault with the line, or None."""
    lines = 1
    with plain_errors(path), open_text(path, encoding) as file:
        while block := file.read(PIECE):
            if found := fault(block):
                return f"line {lines + block.count(chr(10), 0, found[1])}: {found[0]}"
            lines += block.count("\n")
        if file.encoding == "utf-16" or file.newlines not in ("\n", None):
            print(f"{path}: {file.encoding} with line ends {file.newlines!r}, read as UTF-8 with \\n")
    return None


def refuse(path, problem, skip_bad):
    """End the program because of a bad row or file, unless --skip_bad skips those."""
    if not skip_bad:
        raise SystemExit(f"{path} {problem}. Correct it, or skip such rows and files with --skip_bad")


# ---- rows of tables

def rows(source, encoding="utf-8", columns=None, text_only=False):
    """
    Yield (number, row as a dict) of a csv, json or parquet file; for a bad row, (number, what is wrong as a string).
    A parquet file is read only in `columns`; with `text_only` and no columns, in its column `text` or `content`.
    """
    path = source.path
    if source.kind == "parquet":
        table = optional("pyarrow.parquet", path).ParquetFile(path)
        usual = [name for name in ("text", "content") if name in table.schema.names][:1] if text_only else []
        groups = table.iter_batches(batch_size=256, columns=columns or usual or None)   # few: rows can be long
        yield from enumerate(itertools.chain.from_iterable(group.to_pylist() for group in groups), 1)
        return
    with open_text(path, encoding, newline="" if source.kind == "csv" else "\n") as file:
        if source.kind == "csv":
            csv.field_size_limit(1 << 30)
            table = csv.reader(file, delimiter="\t" if ".tsv" in path.suffixes else ",", strict=True)
            header = next(table, [])
            for row in table:
                if row:
                    yield table.line_num, (dict(zip(header, row)) if len(row) == len(header) else
                                           f"{len(row)} fields where the header has {len(header)}")
        else:
            blank = ""
            while (start := file.read(1)).isspace():
                blank += start
            above = blank.count("\n")
            if start == "[":       # one JSON array: the whole file is read into memory
                try:
                    array = json.loads(start + file.read())
                except (ValueError, RecursionError) as error:
                    line = above + getattr(error, "lineno", 1)
                    raise SystemExit(f"{path} line {line}: {broken(error)}") from None
                yield from enumerate((row if isinstance(row, dict) else "not a JSON object" for row in array), 1)
                return
            first = start + (file.readline() if start else "")
            for number, line in enumerate(itertools.chain([first], file), above + 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                        yield number, row if isinstance(row, dict) else "not a JSON object"
                    except (ValueError, RecursionError) as error:
                        yield number, broken(error)


def broken(error):
    """The message for an error of json.loads: JSONDecodeError, RecursionError, or ValueError for a huge number."""
    usual = "nested too deep" if isinstance(error, RecursionError) else "a number of too many digits"
    return f"broken JSON ({getattr(error, 'msg', usual)})"


def text_columns(row, columns, path, first=True):
    """Names of the columns that hold the text of a row: those of --columns, or `text`, `content`, or the only column.
    If that is not clear, the first row of a file ends the program; a later one is a bad row."""
    names = columns or [name for name in ("text", "content") if name in row][:1] or list(row)
    if not columns and len(names) > 1:
        problem = f"which is the text? --columns=NAME, one or more of: {', '.join(row)}"
        raise SystemExit(f"{path}: {problem}") if first else ValueError(problem)
    if missing := [name for name in names if not isinstance(row.get(name), str)]:
        raise ValueError(f"no text in column {missing[0]!r} (columns: {', '.join(row)})")
    return names


# ---- long texts

def cut_point(text):
    """
    Where to cut a long text so that its tokens stay the same: between a visible ASCII character and a space, where
    every split pattern ends a word. Else after a newline, else anywhere (one word is split, no text is lost).
    """
    at = PIECE
    while (at := text.rfind(" ", PIECE // 2, at)) > 0:
        if "!" <= text[at - 1] <= "~":
            return at
    return text.rfind("\n", PIECE // 2, PIECE) + 1 or PIECE


def pieces(blocks, separator=None):
    """Blocks of text -> Pieces of one document, or of the documents between separators. Memory: about two blocks."""
    buffer, begun = "", False
    for block in itertools.chain(blocks, [None]):
        buffer += block or ""
        documents = buffer.split(separator) if separator else [buffer]
        buffer = "" if block is None else documents.pop()
        for text in documents:
            if separator:              # line ends around a separator belong to it
                text = (text if begun else text.lstrip("\n")).rstrip("\n")
            yield Piece(text, True, dropped=None if text or begun else "empty")
            begun = False
        if separator and not begun:
            buffer = buffer.lstrip("\n")
        while len(buffer) > PIECE + len(separator or ""):   # an incomplete separator stays in the buffer
            at = cut_point(buffer)
            if separator:              # line ends that may precede a separator stay in the buffer too
                at = len(buffer[:at].rstrip("\n")) or at
            yield Piece(buffer[:at], False)
            buffer, begun = buffer[at:], True


def blocks_of(text):
    return (text[at:at + PIECE] for at in range(0, len(text), PIECE))


# ---- documents, for prepare.py

def read_pieces(source, cfg):
    """Every document of one file as Pieces of at most about 2 MB. cfg: prepare.py's Config."""
    if source.kind == "topics":
        from pydoc_data.topics import topics
        yield from (Piece(topics[name], True) for name in sorted(topics))
        return
    if source.kind == "world":
        yield from (Piece(document.text, True) for document in make_world(cfg.size, cfg.seed).documents[source.split])
        return
    with plain_errors(source.path):
        if source.kind == "text":
            with open_text(source.path, cfg.encoding) as file:
                yield from pieces(iter(lambda: file.read(PIECE), ""), cfg.separator)
        elif cfg.join_rows:
            yield from pieces(piece.text for piece in row_pieces(source, cfg) if not piece.dropped)
        else:
            yield from row_pieces(source, cfg)


def row_pieces(source, cfg):
    label = "row" if source.kind == "parquet" else "line"
    columns = cfg.columns.split(",") if cfg.columns else None
    for at, (number, row) in enumerate(rows(source, cfg.encoding, columns, text_only=cfg.kind == "text")):
        try:
            if isinstance(row, str):
                raise ValueError(row)
            if cfg.kind == "text":
                text, key = "\n".join(row[name] for name in text_columns(row, columns, source.name, at == 0)), None
            else:
                row, key = to_chat(row) if cfg.kind == "chat" else to_preference(row)
                text = json.dumps(row, ensure_ascii=False)
            if found := fault(text):
                raise ValueError(found[0])
        except ValueError as error:
            refuse(source.path, f"{label} {number}: {error}", cfg.skip_bad)
            yield Piece("", True, dropped="bad")
            continue
        if cfg.kind == "text" and not cfg.join_rows:
            yield from pieces(blocks_of(text))
        else:
            yield Piece(text, True, key)
