"""
Raw text to clean text: read any text, web pages and crawls included, and decide which documents are worth keeping.
Every rule is a flag and off by default; without flags every text stays as it is.

Run     python -m data.curate pages/ crawl.warc.gz > clean.jsonl            # only to text
        python -m data.curate CRAWL.wet.gz --language=en --gopher --repetition --c4 --exact --near=0.8 --out=clean.jsonl
        python -m data.curate notes/ --normalize=NFC --controls --pii > clean.jsonl
        python -m data.curate train.jsonl --decontaminate gsm8k_test.jsonl HumanEval.jsonl.gz --out=clean.jsonl
You see on standard error what each rule dropped or changed, how often, and an example
Reads   .html .warc .wet and all that prepare.py reads (.txt .md .csv .tsv .json .jsonl .parquet, .gz, .zst, folders,
        'globs', URLs, - for standard input). A text longer than 2^20 characters becomes several documents.
Writes  one line {"text": ...} per document, with the other columns of its row (a column "text" that --columns did not
        choose becomes original_text), or url, date, title, source. The order is that of the input, on every run. --out
        is replaced only when everything is written.
Memory  the longest document (a megabyte; a row or a page can be longer). --exact keeps about 90 bytes per document.
        --near keeps about 50, and on disk the text and 8 bytes times 21 bands per document (21 at J = 0.8).
Next    python prepare.py clean.jsonl
"""
import contextlib
import hashlib
import json
import os
import shlex
import sys
import tempfile
import time
import unicodedata
from array import array
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

if __name__ == "__main__" and not __package__:                     # run as a file, it cannot import its package
    raise SystemExit("run it from the project's folder as a module: python -m data.curate IN...")

from data.dedup import NearDuplicates, Overlap
from data.presets import locate
from data.readers import (KINDS, blocks_of, check_text, fault, find_files, known_encoding, open_bytes, open_text,
                          pieces, plain_errors, refuse, rows, text_columns)
from data.rules import (LANGUAGES, RUDE, c4, drop_controls, gopher, hide_personal, language, repetition, strip_accents,
                        word_list)
from data.web import LARGEST, decode_page, page_text, warc_records, warc_text
from nanopath.flags import Bound, check_bounds, parse


@dataclass
class Config:
    sources: tyro.conf.Positional[tuple[str, ...]] = ()   # files, folders, 'globs', URLs, - for standard input
    out: str | None = None          # file to write; by default standard output
    report: str | None = None       # JSON file to write the counts and samples to
    columns: str | None = None      # csv, json, parquet: columns to use, joined by a newline, as in title,text
    separator: str | None = None    # text files: what separates documents; by default a file is one document
    encoding: str = "utf-8"         # of text files without a byte order mark
    skip_bad: bool = False          # skip and count unreadable rows, pages and files instead of stopping
    normalize: Literal["NFC", "NFKC"] | None = None  # Unicode normal form; NFKC also turns ﬁ into fi and ² into 2
    controls: bool = False          # drop control characters, zero-width spaces, U+FFFD; line ends become \n
    strip_accents: bool = False     # é -> e
    lowercase: bool = False         # A -> a
    language: str | None = None     # keep documents in these languages (en or en,de), guessed from frequent words
    gopher: bool = False            # drop documents that break a quality rule of Gopher (made for English)
    repetition: bool = False        # drop documents that repeat lines or phrases too often, by Gopher's rules
    c4: bool = False                # C4's rules: keep lines that end like sentences, drop pages with too few of them
    toxic: str | None = None        # drop documents with a word of this list: a file, one word a line, or built-in
    pii: bool = False               # replace e-mail, phone, card, IBAN, IP and social security numbers by <EMAIL>, ...
    exact: bool = False             # drop a document that equals an earlier one, ignoring white space
    near: Annotated[float, Bound(0.3, 1, off=0)] = 0.0  # drop near-duplicates: Jaccard similarity, try 0.8; 0: off
    decontaminate: tuple[str, ...] = ()   # evaluation files: drop documents that share 13 words in a row with them
    tries: Annotated[int, Bound(1)] = 3   # network attempts per file


WEB = {".html": "html", ".htm": "html", ".xhtml": "html", ".warc": "warc", ".wet": "warc"}
SAMPLES = 3           # examples per rule in the report
SHOWN = 12            # rules on the screen, the most frequent ones


class Report:
    """How many documents each rule dropped or changed, with examples."""

    def __init__(self):
        self.read = self.kept = self.characters_read = self.characters_kept = 0
        self.dropped, self.changed, self.samples = Counter(), Counter(), {}

    def note(self, counter, rule, place, text, before=None):
        """Count one document and keep the first ones as examples; of a changed document, where the change begins."""
        counter[rule] += 1
        samples = self.samples.setdefault(rule, [])
        if len(samples) < SAMPLES:
            if before is not None:
                start = max(0, len(os.path.commonprefix([before, text])) - 20)
                text = f"{before[start:start + 60]!r} -> {text[start:start + 60]!r}"
            samples.append({"where": place, "text": text[:300]})

    def print(self, seconds):
        print(f"read    {self.read:,} documents, {self.characters_read:,} characters, {seconds:.1f} s", file=sys.stderr)
        for name, counter in (("changed", self.changed), ("dropped", self.dropped)):
            for rule, count in counter.most_common(SHOWN):
                sample = self.samples[rule][0]
                text = " ".join(sample["text"].split())[:70]
                print(f"{name} {count:,} {rule}, such as {sample['where']}: {text}", file=sys.stderr)
            if rest := counter.most_common()[SHOWN:]:
                more = sum(count for _, count in rest)
                print(f"{name} {more:,} for {len(rest)} other reasons: --report=FILE lists them", file=sys.stderr)
        print(f"kept    {self.kept:,} documents, {self.characters_kept:,} characters", file=sys.stderr)

    def save(self, path, cfg):
        data = {"arguments": asdict(cfg), "read": self.read, "kept": self.kept, "characters_read": self.characters_read,
                "characters_kept": self.characters_kept, "dropped": self.dropped, "changed": self.changed,
                "samples": self.samples}
        text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
        write_whole(path, lambda file: file.write(text.encode("utf-8")))


# ---- 1. read

def read_documents(sources, cfg, report):
    """Yield (place, text, fields) of every document. A bad file ends the program, or with --skip_bad is counted."""
    for source in sources:
        try:
            with plain_errors(source.path):
                yield from READERS[source.kind](source, cfg, report)
        except SystemExit as error:       # the rest of this file is lost
            if not cfg.skip_bad:
                raise
            report.note(report.dropped, "bad file", source.name, str(error))


def bad(source, problem, cfg, report):
    refuse(source.path, problem, cfg.skip_bad)
    report.note(report.dropped, "bad row or page", source.name, problem)


def read_text(source, cfg, report):
    if problem := check_text(source.path, cfg.encoding):
        return bad(source, problem, cfg, report)
    with open_text(source.path, cfg.encoding) as file:
        for piece in pieces(iter(lambda: file.read(1 << 20), ""), cfg.separator):
            yield source.name, piece.text, {"source": source.name}


def read_table(source, cfg, report):
    label = "row" if source.kind == "parquet" else "line"
    columns = cfg.columns.split(",") if cfg.columns else None
    for at, (number, row) in enumerate(rows(source, cfg.encoding)):
        try:
            if isinstance(row, str):
                raise ValueError(row)
            names = text_columns(row, columns, source.name, first=at == 0)
            text = "\n".join(row[name] for name in names)
            fields = {name: value for name, value in row.items() if name not in names}
            if "text" in fields:         # "text" is the name of what --columns chose
                fields["original_text"] = fields.pop("text")
            if found := fault(text):
                raise ValueError(found[0])
        except ValueError as error:
            bad(source, f"{label} {number}: {error}", cfg, report)
            continue
        for piece in pieces(blocks_of(text)):
            yield f"{source.name} {label} {number}", piece.text, fields


def read_page(source, cfg, report):
    with open_bytes(source.path) as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        return bad(source, f"a page of more than {LARGEST >> 20} MB", cfg, report)
    title, text = page_text(decode_page(data))
    yield from page_pieces(source.name, title, text, {"source": source.name})


def read_warc(source, cfg, report):
    with open_bytes(source.path) as file:
        try:
            for headers, payload in warc_records(file):
                url = headers.get("warc-target-uri", "").strip("<>")
                try:
                    found = warc_text(headers, payload)
                except ValueError as error:
                    bad(source, f"{url}: {error}", cfg, report)
                    continue
                if found is None:
                    report.note(report.dropped, "not text", url, headers.get("content-type", ""))
                    continue
                yield from page_pieces(url, *found, {"url": url, "date": headers.get("warc-date", "")})
        except ValueError as error:
            raise SystemExit(f"{source.path}: {error}") from None


def page_pieces(place, title, text, fields):
    fields |= {"title": title} if title else {}
    for piece in pieces(blocks_of(text.replace("\0", ""))):
        yield place, piece.text, fields


READERS = {"text": read_text, "csv": read_table, "json": read_table, "parquet": read_table, "html": read_page,
           "warc": read_warc}


# ---- 2. apply the rules

def keep(rule):
    """A step from a function that returns the rule that a text breaks, or (rule, example); None keeps the text."""
    def step(text):
        broken = rule(text)
        return (None, broken) if broken else (text, None)
    return step


def change(function):
    return lambda text: (function(text), None)


def steps(cfg):
    """The rules that are switched on, in their order: [(name, text -> (text, None) or (None, why it is dropped))]."""
    wanted = cfg.language.split(",") if cfg.language else []
    chosen = [
        (cfg.normalize, cfg.normalize, change(lambda text: unicodedata.normalize(cfg.normalize, text))),
        (cfg.controls, "controls", change(drop_controls)),
        (cfg.language, "language", keep(lambda text: None if (found := language(text)) in wanted else found)),
        (cfg.c4, "c4", c4),
        (cfg.gopher, "gopher", keep(gopher)),
        (cfg.repetition, "repetition", keep(repetition)),
        (cfg.toxic, "toxic", keep(word_list(toxic_words(cfg))) if cfg.toxic else None),
        (cfg.pii, "pii", change(hide_personal)),
        (cfg.strip_accents, "strip_accents", change(strip_accents)),
        (cfg.lowercase, "lowercase", change(str.lower)),
        (cfg.exact, "exact", keep(seen_before())),
        (cfg.decontaminate, "decontaminate", keep(evaluation_overlap(cfg)) if cfg.decontaminate else None),
        (True, "empty", keep(lambda text: None if text.strip() else "no text")),
    ]
    return [(name, step) for on, name, step in chosen if on]


def seen_before():
    seen = set()

    def rule(text):
        digest = hashlib.blake2b(" ".join(text.split()).encode("utf-8"), digest_size=8).digest()
        number = int.from_bytes(digest, "big")
        if number in seen:
            return "duplicate"
        seen.add(number)
    return rule


def toxic_words(cfg):
    if cfg.toxic == "built-in":
        return RUDE
    try:
        words = Path(cfg.toxic).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeError as error:
        raise SystemExit(f"--toxic={cfg.toxic}: {error}; save it as UTF-8") from None
    if not any(word.strip() for word in words):
        raise SystemExit(f"--toxic={cfg.toxic}: the file holds no word; give one word a line, or --toxic=built-in")
    return words


def strings_in(value):
    """Every string of a row, however deeply nested: in messages, choices, answers."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings_in(item)


def evaluation_overlap(cfg):
    """The rule of --decontaminate. An evaluation text is a string in a row of JSON or a table, or a whole text file."""
    texts = []
    for source in find_files(cfg.decontaminate, lambda url: locate(url, tries=cfg.tries)):
        before = len(texts)
        with plain_errors(source.path):
            if source.kind == "text":
                with open_text(source.path, cfg.encoding) as file:
                    found = [(1, file.read())]
            else:
                found = rows(source, cfg.encoding)
            for number, row in found:
                strings = [text for text in strings_in(row) if text.strip()]
                wrong = [row] if isinstance(row, str) and source.kind != "text" else []
                wrong += [problem[0] for problem in map(fault, strings) if problem]
                if wrong:
                    raise SystemExit(f"--decontaminate: {source.name} {number}: {wrong[0]}")
                texts += strings
        if len(texts) == before:
            raise SystemExit(f"--decontaminate={source.name}: there is no text in it")
    overlap = Overlap(texts)
    print(f"decontaminate: {overlap.texts:,} evaluation texts; {overlap.ignored:,} others have fewer than "
          f"{overlap.SHORTEST} words and are ignored", file=sys.stderr)

    def rule(text):
        shared = overlap.first(text)
        return ("in an evaluation text", shared) if shared else None
    return rule


def clean(sources, todo, cfg, report):
    """Yield (place, text, fields) of the documents that no rule drops."""
    for place, text, fields in read_documents(sources, cfg, report):
        report.read += 1
        report.characters_read += len(text)
        for name, step in todo:
            before = text
            text, why = step(text)
            if text is None:
                why, sample = why if isinstance(why, tuple) else (why, before)
                report.note(report.dropped, f"{name}: {why}", place, sample)
                break
            if text != before:
                report.note(report.changed, name, place, text, before)
        else:
            yield place, text, fields


# ---- 3. write

def json_line(text, fields):
    row = {"text": text, **fields}
    try:
        return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8") + b"\n"
    except UnicodeEncodeError:       # a lone surrogate in another column is written as an escape such as \ud83d
        return json.dumps(row, default=str).encode("utf-8") + b"\n"


def write_clean(sources, todo, cfg, report, file):
    for place, text, fields in clean(sources, todo, cfg, report):
        report.kept += 1
        report.characters_kept += len(text)
        file.write(json_line(text, fields))


def write_without_near(sources, todo, cfg, report, file):
    """write_clean for --near: all documents are stored first, because duplicates are known only after the last one."""
    near, batch, size, offsets = NearDuplicates(cfg.near), [], 0, array("q")
    with tempfile.TemporaryFile() as spool:
        def read(i):
            spool.seek(offsets[i])
            return json.loads(spool.readline())

        for place, text, fields in clean(sources, todo, cfg, report):
            offsets.append(spool.tell())
            spool.write(json_line(text, {"where": place, "fields": fields}))
            batch.append(text)
            size += len(text)
            if size > 1 << 20:
                near.add(batch)
                batch, size = [], 0
        near.add(batch)
        first = near.find(lambda i: read(i)["text"])
        for i in range(len(offsets)):
            row = read(i)
            if first[i] >= 0:
                place = f"{row['where']}, like {read(first[i])['where']}"
                report.note(report.dropped, "near-duplicate", place, row["text"])
                continue
            report.kept += 1
            report.characters_kept += len(row["text"])
            file.write(json_line(row["text"], row["fields"]))


def write_whole(path, write):
    """Call write(file) on a temporary file, then rename it: `path` is complete, or as it was before."""
    path = Path(path)
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(new, "wb") as file:
                write(file)
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise SystemExit(f"{error.filename or path}: {error.strerror or error}; nothing was written. Choose another "
                         f"place with --out=FILE, --report=FILE") from None


def check_places(cfg, sources):
    """Before the long work: refuse files that cannot be written, or that are also to be read."""
    given = [Path(name) for name in (*cfg.decontaminate, *([cfg.toxic] if cfg.toxic else []))]
    read = {path.resolve() for path in [*given, *(source.path for source in sources)]}
    for flag, name in (("out", cfg.out), ("report", cfg.report)):
        if not name:
            continue
        path = Path(name)
        if path.resolve() in read:
            raise SystemExit(f"--{flag}={name} is also to be read; choose another file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                problem = "it is a folder" if path.is_dir() else None
        except OSError as error:
            problem = error.strerror or error
        if problem:
            raise SystemExit(f"--{flag}={name}: {problem}; nothing was written. Choose another --{flag}=FILE")
    if cfg.out and cfg.report and Path(cfg.out).resolve() == Path(cfg.report).resolve():
        raise SystemExit(f"--report={cfg.report} is also the file of --out; choose another file")


def check_rules(cfg):
    """Refuse what cannot work, before anything is read."""
    try:
        check_bounds(cfg)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    unknown = set(cfg.language.split(",")) - set(LANGUAGES) if cfg.language else ()
    for wrong, message in (
        (not cfg.sources, "nothing to read: python -m data.curate FILE-OR-FOLDER... > clean.jsonl"),
        (unknown, f"--language={cfg.language}: choose from {', '.join(LANGUAGES)}"),
        (cfg.toxic and cfg.toxic != "built-in" and not Path(cfg.toxic).is_file(),
         f"--toxic={cfg.toxic}: no such file; one word a line, or --toxic=built-in"),
    ):
        if wrong:
            raise SystemExit(message)
    known_encoding(cfg.encoding)


def main(cfg):
    check_rules(cfg)
    begun, report = time.perf_counter(), Report()
    out = sys.stdout.buffer
    with contextlib.redirect_stdout(sys.stderr):   # standard output is for the data only
        try:
            sources = find_files(cfg.sources, lambda url: locate(url, tries=cfg.tries), KINDS | WEB)
            check_places(cfg, sources)
            action, todo = write_without_near if cfg.near else write_clean, steps(cfg)
            if cfg.out:
                write_whole(cfg.out, lambda file: action(sources, todo, cfg, report, file))
            else:
                action(sources, todo, cfg, report, out)
                out.flush()
        except FileNotFoundError as error:
            raise SystemExit(f"{error.args[0]}: no such file or folder, and no file matches it as a glob") from None
        except KeyboardInterrupt:
            raise SystemExit("\nstopped" + (f"; {cfg.out} is unchanged" if cfg.out else "")) from None
        except BrokenPipeError:                    # as in ... | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
            raise SystemExit(1) from None
    report.print(time.perf_counter() - begun)
    if cfg.report:
        report.save(cfg.report, cfg)
    then = "the same with --out=clean.jsonl: then the text is kept"
    print("next    " + (shlex.join(["python", "prepare.py", cfg.out]) if cfg.out else then), file=sys.stderr)


if __name__ == "__main__":
    main(parse(Config, __doc__))
