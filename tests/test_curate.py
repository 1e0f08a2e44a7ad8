"""data/curate.py and what it stands on: against other projects where they are installed, else against cases worked out by hand."""
import contextlib
import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
import time
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from conftest import DATA, ROOT
from data import curate, dedup, rules, web
from data.curate import Config

DOC = Path("/usr/share/doc")
PROSE = "Yesterday the old baker of the village told me that she would have to close her shop, and that nobody had come to " \
        "buy bread with real money in more than a week. I said that this was sad, because her bread is the best that we " \
        "have ever had in this part of the country. She laughed and gave me a large loaf for nothing at all."


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*sources, **flags):
    """Curate into a file; returns its rows and the report."""
    flags = {"out": "clean.jsonl", "report": "report.json", **flags}
    with contextlib.redirect_stderr(io.StringIO()):
        curate.main(Config(sources=tuple(map(str, sources)), **flags))
    rows = [json.loads(line) for line in Path(flags["out"]).read_text(encoding="utf-8").splitlines()]
    report = json.loads(Path("report.json").read_text(encoding="utf-8"))
    assert report["kept"] == len(rows) and report["characters_kept"] == sum(len(row["text"]) for row in rows)
    judged = {rule: count for rule, count in report["dropped"].items() if rule not in ("bad file", "bad row or page", "not text")}
    assert report["read"] == report["kept"] + sum(judged.values()), "a document is neither kept nor counted"
    assert report["samples"].keys() == report["dropped"].keys() | report["changed"].keys()
    return rows, report


def jsonl(path, rows):
    rows = [row if isinstance(row, dict) else {"text": row} for row in rows]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
    return path


def refused(*sources, **flags):
    with pytest.raises(SystemExit) as stop:
        run(*sources, **flags)
    assert "\n" not in str(stop.value) and not Path("clean.jsonl").exists() and not list(Path().glob("*.new"))
    return str(stop.value)


def real_texts():
    """A few hundred documents of several kinds: articles, plays, code, licences, tables, in part cut to a few hundred words."""
    rng, texts = random.Random(0), []
    for name in ("wikitext2/test.txt", "tinyshakespeare.txt"):
        if (DATA / name).is_file():
            lines = (DATA / name).read_text(encoding="utf-8").split("\n")
            texts += ["\n".join(lines[at:at + rng.randrange(5, 60)]) for at in range(0, len(lines), len(lines) // 120)]
    files = sorted(Path(os.__file__).parent.glob("*.py"))[:60] + sorted(DOC.glob("*/copyright"))[:80] + sorted(DOC.glob("*/README*"))[:40]
    for path in files:
        with contextlib.suppress(OSError, UnicodeError):
            texts.append(path.read_text(encoding="utf-8")[:rng.randrange(500, 20_000)])
    return [text for text in texts if text.strip()]


# ---- nothing is judged unless asked

def test_without_switches_every_text_comes_out_as_it_was():
    texts = [" lead", "trail \n", "CRLF\r\nhere", "ＮＦＫＣ ﬁ", "é e\u0301", "me@example.org", "same", "same", "a" * 3000, "\u200b \x07"]
    rows, report = run(jsonl("in.jsonl", [{"text": text, "id": i, "nested": {"a": [1]}} for i, text in enumerate(texts)]))
    assert rows == [{"text": text, "id": i, "nested": {"a": [1]}} for i, text in enumerate(texts)]
    assert report["changed"] == report["dropped"] == {}


def test_formats_and_columns_and_stdin(monkeypatch):
    Path("a.txt").write_text("one<sep>two", encoding="utf-8")
    Path("b.csv").write_text("title,text,n\nT,body,3\n", encoding="utf-8")
    with gzip.open("c.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"content": "from gz", "url": "u"}\n')
    Path("d.html").write_text("<title>Ti</title><p>page</p>", encoding="utf-8")
    rows, _ = run("a.txt", "b.csv", "c.jsonl.gz", "d.html", separator="<sep>")
    assert rows == [{"text": "one", "source": "a.txt"}, {"text": "two", "source": "a.txt"}, {"text": "body", "title": "T", "n": "3"},
                    {"text": "from gz", "url": "u"}, {"text": "page", "source": "d.html", "title": "Ti"}]
    rows, _ = run("b.csv", columns="title,text")
    assert rows == [{"text": "T\nbody", "n": "3"}]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "piped"}\n')))
    assert run("-")[0] == [{"text": "piped"}]
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table({"text": ["p"], "n": [1]}), "e.parquet")
    assert run("e.parquet")[0] == [{"text": "p", "n": 1}]


def test_standard_output_is_only_data_and_the_chain_to_prepare_works():
    jsonl("in.jsonl", [f"{i} {PROSE}" for i in range(30)] + ["short"] * 3)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "data.curate", "in.jsonl", "--gopher", "--exact"], capture_output=True, env=environment)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 30 and b"kept    30 documents" in done.stderr and b"gopher: words not 50" in done.stderr
    Path("clean.jsonl").write_bytes(done.stdout)
    done = subprocess.run([sys.executable, str(ROOT / "prepare.py"), "clean.jsonl"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "27 documents" in done.stdout
    head = subprocess.run(f"{sys.executable} -m data.curate in.jsonl | head -c 10", shell=True, capture_output=True, env=environment)
    assert head.returncode == 0 and b"Traceback" not in head.stderr


def test_two_runs_give_the_same_bytes_and_an_old_file_outlives_a_failed_run():
    jsonl("in.jsonl", [f"{PROSE} {i % 7}" for i in range(300)])
    run("in.jsonl", near=0.8, exact=True)
    first = Path("clean.jsonl").read_bytes()
    run("in.jsonl", near=0.8, exact=True)
    assert Path("clean.jsonl").read_bytes() == first
    Path("bad.jsonl").write_text('{"text": "a"}\nbroken\n', encoding="utf-8")
    with pytest.raises(SystemExit, match="bad.jsonl line 2"):
        run("bad.jsonl")
    with pytest.raises(SystemExit, match="is also to be read"):
        run("clean.jsonl")
    assert Path("clean.jsonl").read_bytes() == first and not list(Path().glob("*.new"))


# ---- bad input

@pytest.mark.parametrize("name, content, words", [
    ("nul.txt", b"line one\nline\0two\n", "line 2: NUL"),
    ("latin.txt", "plain\ncaf\u00e9\n".encode("latin-1"), "line 2: byte 0xE9.*--encoding=latin-1"),
    ("broken.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', "line 3: broken JSON"),
    ("surrogate.jsonl", b'{"text": "\\ud800"}\n', r"line 1: lone surrogate U\+D800"),
    ("columns.jsonl", b'{"title": "a", "body": "b"}\n', "--columns=NAME.*title, body"),
    ("ragged.csv", b"id,text\n1,a\n2,b,c\n", "line 3: 3 fields where the header has 2"),
    ("cut.txt.gz", gzip.compress(os.urandom(9000).hex().encode())[:5000], "cut short"),
    ("cut.warc", b"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: 100\r\n\r\nabc", "cut short"),
    ("not.warc", b"just text\n", "not a WARC file"),
])
def test_bad_files(name, content, words):
    Path(name).write_bytes(content)
    line = refused(name)
    assert name in line and re.search(words, line), line


def test_skip_bad_counts_what_it_leaves_out_and_keeps_the_rest():
    Path("a.jsonl").write_bytes(b'{"text": "a"}\nnonsense\n{"text": ""}\n{"text": "\\ud800"}\n{"text": "b"}\n')
    Path("b.txt").write_bytes(b"\0\0\0")
    whole = gzip.compress(b"".join(b'{"text": "%d %s"}\n' % (i, os.urandom(20).hex().encode()) for i in range(3000)))
    Path("c.jsonl.gz").write_bytes(whole[:len(whole) // 2])
    rows, report = run("a.jsonl", "b.txt", "c.jsonl.gz", skip_bad=True)
    assert [row["text"] for row in rows[:2]] == ["a", "b"] and 500 < len(rows) < 2500, "what stands before the cut should stay"
    assert report["dropped"] == {"bad row or page": 3, "bad file": 1, "empty: no text": 1}
    assert "nonsense" not in str(rows) and "broken JSON" in str(report["samples"])


def test_encodings():
    text = "Zeile eins: äöü\nZeile zwei: €\n"
    for name, content, encoding in (("a", text.encode("utf-16"), "utf-8"), ("b", text.encode("utf-8-sig"), "utf-8"),
                                    ("c", text.replace("\n", "\r\n").encode(), "utf-8"), ("d", text.encode("cp1252"), "cp1252")):
        Path(f"{name}.txt").write_bytes(content)
        assert run(f"{name}.txt", encoding=encoding)[0][0]["text"] == text


def test_flags_are_checked_first():
    assert "--language=xx" in refused("a", language="xx")
    assert "--near=2" in refused("a", near=2)
    assert "--near=0.1" in refused("a", near=0.1)
    assert "--toxic=nowhere" in refused("a", toxic="nowhere")
    assert "--encoding=klingon" in refused("a", encoding="klingon")
    assert "nowhere.txt" in refused("nowhere.txt")
    assert "nowhere.jsonl" in refused(jsonl("in.jsonl", ["a"]), decontaminate=("nowhere.jsonl",))
    assert "nothing to read" in refused()
    for number, name in enumerate(Config.__dataclass_fields__):
        assert f"cfg.{name}" in (ROOT / "data" / "curate.py").read_text(encoding="utf-8"), name


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory the Linux way")
def test_a_line_of_200_mb_is_cut_and_needs_little_memory():
    with open("line.txt", "wb") as file:
        for i in range(200):
            file.write((b"%d words and more words without end " % i * 40000)[:1 << 20])
    size = Path("line.txt").stat().st_size
    script = ("import re; from data import curate; curate.main(curate.Config(('line.txt',), out='o', exact=True, near=0.8));"
              "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status', encoding='utf-8').read())[1]) // 1024)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 450, "MB"
    read = re.search(r"read +([\d,]+) documents, ([\d,]+) char", done.stderr)
    assert int(read[1].replace(",", "")) >= 200 and int(read[2].replace(",", "")) == size > 200e6


# ---- pages

PAGE = """<!DOCTYPE html><html><head><title>A &amp; B</title><style>p {color: red}</style><script>if (a < b) "<p>no</p>"</script></head>
<body class="has-sidebar"><header><a href="/">Home</a></header><nav><ul><li>Menu one</ul></nav>
<div class="sidebar wide">Beside</div><div id="cookie-banner">We use cookies</div>
<main><header><h1>Big   title</h1></header><p>One <b>bold</b> &lt;tag&gt;,
 next&nbsp;line<br>after break<p>Two unclosed
<pre>def f():
    return 1
</pre><ul><li>first<li>second <i>x</i></ul><table><tr><th>k<th>v<tr><td>1</td><td>2</td></tr></table>
<div hidden>secret</div><div style="display: none">secret</div><span aria-hidden=true>secret</span></main>
<ul><li><a href=1>only</a></li><li><a href=2>links</a></li><li><a href=3>here</a></li></ul>
<p>See <a href=4>this</a> too.</p><form><input value=x>Search</form><footer>(c) 2026</footer></body></html>"""


def test_a_page_keeps_its_blocks_and_loses_its_frame():
    title, text = web.page_text(PAGE)
    assert title == "A & B"
    assert text == ("Big title\n\nOne bold <tag>, next line\nafter break\n\nTwo unclosed\n\ndef f():\n    return 1\n\n"
                    "first\nsecond x\n\nk | v\n1 | 2\n\nSee this too.")


def test_text_of_real_pages_holds_what_trafilatura_finds():
    trafilatura = pytest.importorskip("trafilatura")
    pages = [*sorted(DOC.glob("*/*.html"))[:4], *sorted(DOC.glob("nodejs/api/*.html"))[1:4]]
    pages = [page for page in pages if 3000 < page.stat().st_size < 300_000]
    compared = 0
    for page in pages:
        _, text = web.page_text(web.decode_page(page.read_bytes()))
        theirs = trafilatura.extract(page.read_bytes().decode("utf-8", "replace")) or ""
        ours, want = (Counter(re.findall(r"\w+", t)) for t in (text, theirs))
        if want.total() > 200:
            compared += 1
            assert (ours & want).total() > 0.95 * want.total(), f"{page}: text is missing"
            assert ours.total() < 2.2 * want.total(), f"{page}: too much is left"
    if not compared:
        pytest.skip("no HTML pages on this machine")


def test_broken_pages_neither_crash_nor_hang():
    start = time.perf_counter()
    for part in ("<", "<a ", "<!--", "<p>", "</x>", "<div>", "&", "<script>", "<![CDATA[", "<a href='", "<![if x]>", "<!x ", "<?"):
        web.page_text(part * 20_000)
    assert time.perf_counter() - start < 8, "20,000 times the same is not much: something is quadratic"
    rng = random.Random(0)
    bits = re.findall(r"<[^>]*>|[^<>]+|.", PAGE) + ["<![", "<!--", "-->", "]]>", "&#x;", "&#99999999;", "\0", "<a b='c", ">", "é"]
    for _ in range(600):
        web.page_text("".join(rng.choices(bits, k=rng.randrange(40))))


@pytest.mark.parametrize("data, declared, text", [
    ("<meta charset=iso-8859-1>\u201ccafé\u201d".encode("cp1252"), None, "“café”"),
    ('<meta http-equiv="Content-Type" content="text/html; charset=windows-1251">Да'.encode("cp1251"), None, "Да"),
    ("日本".encode("euc-jp"), "EUC-JP", "日本"),
    ("é".encode("utf-8"), None, "é"),
    ("é".encode("latin-1"), None, "é"),
    ("é".encode("utf-8"), "no-such-charset", "é"),
    ("é".encode("utf-16"), "utf-8", "é"),
])
def test_the_encoding_of_a_page(data, declared, text):
    assert web.page_text(web.decode_page(data, declared))[1] == text


def record(kind, payload, **headers):
    lines = {"WARC-Type": kind, "WARC-Target-URI": "http://x/", "Content-Length": len(payload), **headers}
    return b"WARC/1.0\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()).encode() + b"\r\n" + payload + b"\r\n\r\n"


def http(body, kind="text/html", status="200 OK", **headers):
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{lines}\r\n".encode() + body


def test_crawls(monkeypatch):
    page = b"<p>Hello <b>crawl</b></p>"
    chunked = b"5\r\n<p>He\r\n14;x=y\r\n" + page[5:] + b"\r\n0\r\n\r\n"
    records = [
        record("warcinfo", b"software: x"),
        record("request", b"GET / HTTP/1.1\r\n\r\n"),
        record("response", http(page), **{"WARC-Date": "2026-01-02T03:04:05Z"}),
        record("response", http(chunked, Transfer_Encoding="chunked")),
        record("response", http(gzip.compress(page), Content_Encoding="gzip")),
        record("response", http(zlib.compress(page), Content_Encoding="deflate")),
        record("response", http("<p>Grüße</p>".encode("latin-1"), "text/html; charset=ISO-8859-1")),
        record("response", http(b"not found", status="404 Not Found")),
        record("response", http(b"\x89PNG\0", "image/png")),
        record("response", http(b"plain\0 text", "text/plain")),
        record("conversion", "WET ist schon Text.\n".encode(), **{"Content-Type": "text/plain"}),
    ]
    want = ["Hello crawl"] * 4 + ["Grüße", "plain text", "WET ist schon Text.\n"]
    Path("a.warc").write_bytes(b"".join(records))
    Path("b.warc.gz").write_bytes(b"".join(map(gzip.compress, records)))   # a member for each record, as Common Crawl does
    for name in ("a.warc", "b.warc.gz"):
        rows, report = run(name)
        assert [row["text"] for row in rows] == want and report["dropped"] == {"not text": 2}
        assert rows[0] == {"text": "Hello crawl", "url": "http://x/", "date": "2026-01-02T03:04:05Z"}
    Path("d.warc").write_bytes(record("response", b"HTTP/1.1 200 OK\nContent-Type: text/html\n\n<p>no\r\n\r\ncarriage return"))
    assert [row["text"] for row in run("d.warc")[0]] == ["no carriage return"]
    brotli = record("response", http(page, Content_Encoding="br"))
    Path("c.warc").write_bytes(brotli + records[2])
    assert "http://x/: a page compressed with br" in refused_later("c.warc")
    assert run("c.warc", skip_bad=True)[1]["dropped"] == {"bad row or page": 1}
    monkeypatch.setattr(web, "LARGEST", 1 << 20)
    with pytest.raises(ValueError, match="more than 1 MB"):
        web.http_body({"content-encoding": "gzip"}, gzip.compress(bytes(2 << 20)))
    whole = b"".join(map(gzip.compress, records))
    Path("d.warc.gz").write_bytes(whole[:-30])
    rows, report = run("d.warc.gz", skip_bad=True)
    assert [row["text"] for row in rows] == want[:-1] and report["dropped"]["bad file"] == 1


def refused_later(name):
    Path("clean.jsonl").unlink()
    return refused(name)


def test_crawls_written_by_warcio():
    writer = pytest.importorskip("warcio.warcwriter")
    from warcio.statusandheaders import StatusAndHeaders
    with open("w.warc.gz", "wb") as file:
        warc = writer.WARCWriter(file, gzip=True)
        for i in range(20):
            headers = StatusAndHeaders("200 OK", [("Content-Type", "text/html; charset=utf-8")], protocol="HTTP/1.0")
            body = f"<html><p>Seite {i}: äöü</p>".encode()
            warc.write_record(warc.create_warc_record(f"http://example.com/{i}", "response", payload=io.BytesIO(body), http_headers=headers))
    rows, _ = run("w.warc.gz")
    assert [(row["url"], row["text"]) for row in rows] == [(f"http://example.com/{i}", f"Seite {i}: äöü") for i in range(20)]


# ---- normalization, language

VOICED = re.compile("[\u3099\u309a]")


def test_accents_of_hangul_and_kana():
    assert rules.strip_accents("한국어 がぱ ガ é ü") == "한국어 がぱ ガ e u"


def test_normalization_equals_huggingfaces_bert_normalizer():
    normalizers = pytest.importorskip("tokenizers").normalizers
    texts = real_texts()[::5] + ["Élan ÅNGSTRÖM naïve Straße İstanbul ŒUVRE Việt ﬁ ²"]
    texts += [c for c in map(chr, range(0x20, 0x20000)) if unicodedata.ucd_3_2_0.category(c) not in ("Cn", "Cs", "Co")]
    for lower, accents in ((True, False), (False, True), (True, True)):
        theirs = normalizers.BertNormalizer(clean_text=False, handle_chinese_chars=False, strip_accents=accents, lowercase=lower)
        theirs = normalizers.Sequence([theirs, normalizers.NFC()])       # it leaves Hangul in parts
        ours = [rules.strip_accents(text) if accents else text for text in texts]
        ours = [text.lower() if lower else text for text in ours]
        ours = [unicodedata.normalize("NFC", text) for text in ours]
        different = [(a, b) for a, b in zip(ours, map(theirs.normalize_str, texts)) if a != b and not VOICED.search(
            unicodedata.normalize("NFD", a))]
        assert len(different) <= 30, different[:40]     # letters whose case or marks came with a later Unicode
    text = "e\u0301 ﬁ ²\r\n\x07a\u200bb\ufeffc\u200dd\te"
    assert run(jsonl("in.jsonl", [text]), normalize="NFC")[0][0]["text"] == unicodedata.normalize("NFC", text)
    rows, report = run("in.jsonl", normalize="NFKC", controls=True, lowercase=True, strip_accents=True)
    assert rows[0]["text"] == "e fi 2\nabc\u200dd\te" and report["changed"] == {"NFKC": 1, "controls": 1, "strip_accents": 1}


@pytest.mark.skipif(not (DATA / "multi30k").is_dir(), reason="no NANOPATH_DATA here")
def test_english_and_german_are_told_apart():
    for name, least in (("en", 0.98), ("de", 0.98)):
        lines = gzip.open(DATA / "multi30k" / f"val.{name}.gz", "rt", encoding="utf-8").read().splitlines()
        found = Counter(map(rules.language, lines))
        assert found[name] > least * len(lines), f"single sentences: {found}"
        texts = ["\n".join(lines[at:at + 10]) for at in range(0, len(lines), 10)]
        assert {rules.language(text) for text in texts} == {name}


@pytest.mark.parametrize("code, text", [
    ("fr", "Le chat est sur la table et les enfants sont dans le jardin avec leur mère pour une heure."),
    ("es", "El gato está en la mesa y los niños se han ido al jardín con su madre por una hora."),
    ("ru", "Кошка сидит на столе, и дети ушли в сад вместе с матерью; это было вчера."),
    ("uk", "Кішка сидить на столі, і діти пішли в сад разом з матір'ю; це було вчора."),
    ("el", "Η γάτα κάθεται στο τραπέζι"), ("he", "החתול יושב על השולחן"), ("ar", "القطة تجلس على الطاولة"),
    ("fa", "گربه روی میز نشسته است و بچه ها در باغ هستند"), ("hi", "बिल्ली मेज पर बैठी है"), ("th", "แมวนั่งอยู่บนโต๊ะ"),
    ("ko", "고양이가 탁자 위에 앉아 있다"), ("ja", "猫がテーブルの上に座っている。"), ("zh", "猫坐在桌子上，孩子们在花园里。"),
    ("unknown", "xyzzy plugh qwerty asdf"), ("unknown", "12345 67890"), ("unknown", ""),
])
def test_languages(code, text):
    assert rules.language(text) == code
    kept = [row["text"] for row in run(jsonl("in.jsonl", [text, PROSE]), language="en")[0]]
    assert kept == [PROSE]


def test_languages_of_a_real_translation():
    """Messages of an editor, which this machine may carry in many languages."""
    import gettext
    share = {}
    for code in ("da", "de", "es", "fi", "it", "ko", "nl", "pl", "ru", "sv", "uk", "vi", "sr"):
        path = Path(f"/usr/share/vim/vim90/lang/{code}/LC_MESSAGES/vim.mo")
        if path.is_file():
            with contextlib.suppress(UnicodeError), open(path, "rb") as file:
                texts = [re.sub(r"%\w|\S*[\"'<>:=]\S*", " ", text) for text in gettext.GNUTranslations(file)._catalog.values()
                         if isinstance(text, str) and text.count(" ") > 3]
                groups = [" ".join(texts[at:at + 30]) for at in range(0, len(texts), 30)]
                share[code] = sum(rules.language(group) == code for group in groups) / len(groups)
    if not share:
        pytest.skip("no translated messages on this machine")
    assert all(value > 0.85 for value in share.values()), share


# ---- quality: each rule on both sides of its threshold

WORDS50 = "the cat and " + "word " * 47
GOPHER_CASES = [
    ("words", WORDS50, None), ("words", WORDS50[:-5], "words not 50"), ("words", "the and " + "word " * 100_000, "words not 50"),
    ("length", "the and " + "ab " * 60, "mean word length"), ("length", "the and " + "abc " * 60, None),
    ("length", "the and " + "abcdefghijk " * 60, "mean word length"),
    ("hash", WORDS50 + "# " * 5, None), ("hash", WORDS50 + "# " * 6, "#"), ("dots", WORDS50 + "so... " * 7, r"# or \.\.\."),
    ("bullets", "- the and word word word word\n" * 9 + "not a bullet here", None),
    ("bullets", "- the and word word word word\n" * 19 + "not a bullet here", "bullets"),
    ("ends", ("the and word word word word word word word word word\n" * 7 + "this ends so…\n" * 3), None),
    ("ends", ("the and word word word word word word word word word\n" * 6 + "this ends so…\n" * 4), "lines end in"),
    ("letters", "the and " + "word " * 78 + "1234 " * 20, None), ("letters", "the and " + "word " * 77 + "1234 " * 21, "have a letter"),
    ("stop", "the " + "word " * 60, "fewer than 2 of"), ("stop", "the to " + "word " * 60, None),
]


@pytest.mark.parametrize("name, text, broken", GOPHER_CASES)
def test_gopher_rules(name, text, broken):
    found = rules.gopher(text)
    assert re.search(broken, found) if broken else found is None, found


def distinct(count, start=0):
    return [f"w{start + i:05d}" for i in range(count)]


def test_repetition_rules():
    lines = ["\n".join(" ".join(distinct(8, 100 * i)) for i in range(10))]
    assert rules.repetition(lines[0]) is None
    assert "lines" in rules.repetition(lines[0] + "\n" + "\n".join(["same short line"] * 6))       # 5 of 16 repeat
    assert rules.repetition(lines[0] + "\n" + "\n".join(["x"] * 5)) is None                        # 4 of 15 do not
    paragraphs = lines[0].replace("\n", "\n\n")
    assert "paragraphs" in rules.repetition(paragraphs + "\n\n" + "\n\n".join(["again and again"] * 6))
    # 100 words of 6 letters are 699 characters; a pair of 13 that stands there 11 times has 143 of 699 = 20.5 %
    words = distinct(78)
    spread = [w for i in range(11) for w in ("aaaaaa bbbbbb".split() + words[7 * i:7 * i + 7])] + [words[-1]]
    assert len(" ".join(spread)) == 699 and "run of 2 words" in rules.repetition(" ".join(spread))
    spread = [w for i in range(10) for w in ("aaaaaa bbbbbb".split() + words[7 * i:7 * i + 7])] + distinct(10, 500)
    assert len(" ".join(spread)) == 699 and rules.repetition(" ".join(spread)) is None             # 10 times: 18.6 %
    five = distinct(5, 900)
    assert rules.repetition(" ".join(five + distinct(90) + five)) is None                          # 30 of 699: 4.3 %
    three = [distinct(5, 900 + 5 * k) for k in range(3)]
    many = sum((three[i % 3] + distinct(6, 50 * i) for i in range(9)), [])                         # 6 * 30 of 692: 26 %
    assert "repeated runs of 5" in rules.repetition(" ".join(many))


def datatrove_filters(monkeypatch):
    """Its filters, with our way to split words and sentences, so that only the rules are compared."""
    pytest.importorskip("datatrove.pipeline.filters.c4_filters")
    from datatrove.data import Document
    from datatrove.pipeline.filters import c4_filters, gopher_quality_filter, gopher_repetition_filter
    for module in (gopher_quality_filter, gopher_repetition_filter):
        monkeypatch.setattr(module, "split_into_words", lambda text, language: text.split())
    monkeypatch.setattr(c4_filters, "split_into_sentences", lambda text, language: [None] * rules.sentences(text))

    def passes(made):
        def judge(text):
            document = Document(text=text, id="0")
            verdict = made.filter(document)
            return (verdict if isinstance(verdict, bool) else verdict[0]), document.text
        return judge
    return [passes(made) for made in (gopher_quality_filter.GopherQualityFilter(), gopher_repetition_filter.GopherRepetitionFilter(),
                                      c4_filters.C4QualityFilter(min_words_per_line=5, min_num_sentences=3))]


def test_verdicts_equal_datatroves(monkeypatch):
    quality, repeats, c4 = datatrove_filters(monkeypatch)
    texts = real_texts() + [text for _, text, _ in GOPHER_CASES] + [web.page_text(PAGE)[1], PROSE, PROSE * 3]
    counts = Counter()
    for text in texts:
        counts["quality", rules.gopher(text) is None, quality(text)[0]] += 1
        counts["repeats", rules.repetition(text) is None, repeats(text)[0]] += 1
        kept, why = rules.c4(text)
        counts["c4", why is None, c4(text)[0]] += 1
        if why is None and "”" not in text:
            assert kept == c4(text)[1]
    for name in ("quality", "repeats", "c4"):
        agreed = counts[name, True, True] + counts[name, False, False]
        assert counts[name, True, True] > 20 and counts[name, False, False] > 20, "the texts do not try the rules"
        assert agreed >= 0.98 * len(texts), (name, counts)
    assert counts["c4", True, False] + counts["c4", False, True] <= 1


def test_c4_by_hand():
    good = "This is one sentence. Here is the second one! And is this the third?\nThe fourth stands on a line of its own.\n" \
           "\"A quoted fifth,\" she said.\n"
    page = "Menu | Home\nBuy now\n" + good + "Please enable Javascript to see this page.\nRead our privacy policy for all that.\n" \
           "It went on and on...\nIt is a fact.[1][citation needed]\nNo full stop here\n" + "x" * 1001 + " two three.\n"
    kept, why = rules.c4(page)
    assert why is None and kept == good + "It is a fact."
    assert rules.c4("One two three. Four five six.\n")[1] == "fewer than 3 sentences"
    assert rules.c4("One two three four five. Another. A third.\nOnly four words here.")[0] == "One two three four five. Another. A third."
    assert rules.c4(good + "And Lorem ipsum dolor sit amet.")[1] == "lorem ipsum"
    assert rules.c4(good + "int main() { return 0; } is code.")[1] == "a curly bracket"
    assert [rules.sentences(line) for line in ("A. B? C!", "No end", "Mr. X went.", "3.14 is pi.", "")] == [3, 1, 2, 1, 0]


# ---- personal data, words

def test_personal_data_is_hidden_and_other_numbers_stay():
    hidden = {
        "write to Jane.Doe+x@mail.example.co.uk today": "write to <EMAIL> today",
        "card 4111 1111 1111 1111, or 5500-0000-0000-0004.": "card <CARD>, or <CARD>.",
        "IBAN GB82 WEST 1234 5698 7654 32 please": "IBAN <IBAN> please", "DE89370400440532013000": "<IBAN>",
        "SSN 123-45-6789": "SSN <SSN>", "from 8.8.8.80:443 and 2001:4860:4860::8888": "from <IP>:443 and <IP>",
        "host 93.184.216.34 answered": "host <IP> answered",
        "call (415) 555-2671 or 415-555-2671 or +49 30 1234567 or +1-800-555-0199": "call <PHONE> or <PHONE> or <PHONE> or <PHONE>",
    }
    for text, want in hidden.items():
        assert rules.hide_personal(text) == want
    for text in ("4111 1111 1111 1112 fails the check sum", "0000 0000 0000 0000", "127.0.0.1 and 192.168.1.10 and 300.1.2.3", "version 1.2.3.4",
                 "at 12:30:45 on 2026-11-25", "std::vec and a::b", "pi is 3.14159265358979", "ISBN 978-3-16-148410-0", "a@b", "@name",
                 "10,000,000 people", "1914-1918", "GB82 WEST 1234 5698 7654 33", "call 911 or 112", "2 + 2 = 4", "666-12-3456"):
        assert rules.hide_personal(text) == text
    numbers = ["4539578763621486", "6011111111111117", "378282246310005", "30569309025904"]     # known test numbers of card firms
    assert all(map(rules.luhn, numbers))
    for number in numbers:   # the sum notices every single wrong digit
        assert not any(rules.luhn(number[:i] + d + number[i + 1:]) for i in range(len(number)) for d in "0123456789" if d != number[i])
    start = time.perf_counter()
    for unit in ("a", "1", "1.", "1:", "a.", "1-", "1 ", "A1", "a@", "+1 ", "(1"):
        rules.hide_personal(unit * 200_000)
    assert time.perf_counter() - start < 10, "a pattern is quadratic"


@pytest.mark.skipif(not (DATA / "gsm8k_test.jsonl").is_file(), reason="no NANOPATH_DATA here")
def test_personal_data_of_real_text():
    _, report = run(DATA / "gsm8k_test.jsonl", DATA / "wikitext2" / "test.txt", columns="question,answer", separator=" \n = ", pii=True)
    assert report["changed"].get("pii", 0) <= 2, f"sums and articles taken for somebody's numbers: {report['samples']}"


def test_word_lists():
    jsonl("in.jsonl", ["What a SHIT day!", "Scunthorpe and shitake are fine", "a bad apple", "bad, apple", "nothing"])
    rows, report = run("in.jsonl", toxic="built-in")
    assert len(rows) == 4 and report["dropped"] == {"toxic: shit": 1}
    Path("list.txt").write_text("bad apple\n\nDAY\n", encoding="utf-8")
    rows, report = run("in.jsonl", toxic="list.txt")
    assert [row["text"] for row in rows] == ["Scunthorpe and shitake are fine", "nothing"]
    assert report["dropped"] == {"toxic: day": 1, "toxic: bad apple": 2}


def test_exact_duplicates_and_empty_documents():
    rows, report = run(jsonl("in.jsonl", ["a b", " a\n b ", "A b", "", " \n", "a b"]), exact=True)
    assert [row["text"] for row in rows] == ["a b", "A b"]
    assert report["dropped"] == {"exact: duplicate": 3, "empty: no text": 1}     # the second empty one is a duplicate


# ---- near-duplicates

def slow_shingles(text, n):
    words = dedup.words_of(text).split(b" ")
    return {b" ".join(words[i:i + n]) for i in range(max(1, len(words) - n + 1))}


def test_shingles_are_one_number_for_each_run_of_words():
    texts = real_texts()[:60] + ["one", "one two three", "Ünï cödé, 猫が いる; “quoted” — yes!", "?!", "a " * 50, "A\tb\nA b a, b."]
    words = [dedup.words_of(text) for text in texts]
    for n in (1, 5, 13):
        hashes, starts = dedup.shingles(words, n)
        numbers, at = {}, 0
        for i, word in enumerate(words):
            assert starts[i] == at
            parts = word.split(b" ")
            for k in range(max(1, len(parts) - n + 1)):
                assert numbers.setdefault(b" ".join(parts[k:k + n]), hashes[at]) == hashes[at]
                at += 1
        assert at == len(hashes) and len(set(numbers.values())) == len(numbers), "two runs have the same hash"
    assert dedup.words_of("The CAT's  “hat”…") == b"the cat s hat" and dedup.words_of("猫がいる x") == "猫 が い る x".encode()


def planted(count, seed=0, length=300):
    """`count` originals, then as many copies of them with changed words: Jaccard similarities from 0.4 to 1."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(2, 9))) for _ in range(5000)]
    originals = [rng.choices(vocabulary, k=length) for _ in range(count)]
    copies = []
    for words in originals:
        share, words = rng.uniform(0.4, 1), list(words)
        for at in rng.sample(range(length), int(length * (1 - 2 * share / (1 + share)) / 5)):
            words[at] = rng.choice(vocabulary) + "x"
        copies.append(words)
    texts = [" ".join(words) for words in originals + copies]
    sets = [slow_shingles(text, 5) for text in texts]
    return texts, [len(sets[i] & sets[count + i]) / len(sets[i] | sets[count + i]) for i in range(count)]


def candidates(near):
    return {pair for band in range(near.bands) for left, right in dedup.bucket_pairs(near.keys(band)) for pair in zip(left.tolist(), right.tolist())}


def test_planted_duplicates_are_found_as_often_as_theory_says():
    texts, similar = planted(600)
    near = dedup.NearDuplicates(0.8)
    assert (near.bands, near.rows) == (21, 6)
    near.add(texts)
    found = candidates(near)
    chance = np.array([1 - (1 - j ** near.rows) ** near.bands for j in similar])
    hits = sum((i, 600 + i) in found for i in range(600))
    assert abs(hits - chance.sum()) < 4 * np.sqrt((chance * (1 - chance)).sum()), (hits, chance.sum())
    assert len(found) - hits < 3, "documents that share nothing are candidates"
    group = near.find(texts.__getitem__)
    assert all(group[:600] == -1), "the first of a group stays"
    for i, j in enumerate(similar):   # what is dropped is a duplicate in truth; of the true ones 99 % are found
        assert group[600 + i] in (-1, i) and (j >= 0.8 or group[600 + i] == -1)
    true = [i for i, j in enumerate(similar) if j >= 0.8]
    assert sum(group[600 + i] == i for i in true) >= 0.98 * len(true) > 100


def test_signatures_estimate_the_similarity_as_well_as_theory_allows():
    rng, errors, variance = np.random.default_rng(0), [], []
    for _ in range(1500):
        both = rng.integers(60, 600)
        numbers = rng.integers(0, 2 ** 63, 1200 - both, dtype=np.uint64)
        j = both / len(numbers)
        ours = dedup.signatures(np.concatenate([numbers[:600], numbers[600 - both:]]), np.array([0, 600]))
        errors.append((ours[0] == ours[1]).mean() - j)
        variance.append(j * (1 - j) / dedup.PERMUTATIONS)
    assert np.sqrt(np.mean(np.square(errors))) < 1.08 * np.sqrt(np.mean(variance))
    assert abs(np.mean(errors)) < 0.004


def test_candidates_and_recall_against_datasketch():
    datasketch = pytest.importorskip("datasketch")
    texts, similar = planted(400, seed=1)
    near = dedup.NearDuplicates(0.8)
    near.add(texts)
    found = candidates(near)
    mine = dedup.signatures(*dedup.shingles([dedup.words_of(text) for text in texts], 5))
    by_mine, by_theirs = (datasketch.MinHashLSH(num_perm=128, params=(near.bands, near.rows)) for _ in range(2))
    same, theirs = set(), set()
    for i, text in enumerate(texts):
        a = datasketch.MinHash(num_perm=128, hashvalues=mine[i].astype(np.uint64), scheme="legacy")
        b = datasketch.MinHash(num_perm=128)
        b.update_batch(list(slow_shingles(text, 5)))
        same |= {(k, i) for k in by_mine.query(a)}
        theirs |= {(k, i) for k in by_theirs.query(b)}
        by_mine.insert(i, a)
        by_theirs.insert(i, b)
    assert found == same, "its LSH on our signatures"
    true = {(i, 400 + i) for i, j in enumerate(similar) if j >= 0.8}
    group = near.find(texts.__getitem__)
    dropped = {(int(group[i]), i) for i in range(len(texts)) if group[i] >= 0}
    assert len(true) > 80 and dropped <= true, "precision is 1, by the check"
    assert len(dropped & true) / len(true) >= len(theirs & true) / len(true) - 0.02, "recall as theirs"
    assert len(theirs & true) / len(theirs) < 0.9, "the check is worth something"


def test_groups_chains_and_many_equals():
    words = [f"w{i}" for i in range(400)]
    a, b, c = (" ".join(words[k:k + 300]) for k in (0, 20, 40))      # neighbours .87 alike, the ends .76
    texts = [a, "something else entirely", c, b] + [a.upper() + "!"] * 200 + [c]
    rows, report = run(jsonl("in.jsonl", texts), near=0.8)
    assert [row["text"] for row in rows] == [a, "something else entirely"]
    assert report["dropped"] == {"near-duplicate": 203} and "like in.jsonl line 1" in report["samples"]["near-duplicate"][0]["where"]
    assert len(run(jsonl("in.jsonl", [a, c]), near=0.8)[0]) == 2
    assert run(jsonl("empty.jsonl", []), near=0.8)[0] == []
    assert len(run(jsonl("in.jsonl", ["?", "!", "? ", "one", "One"]), near=0.8)[0]) == 3
    for threshold in (0.3, 0.5, 0.7, 0.9, 0.95, 1.0):
        b, r = dedup.bands_for(threshold)
        assert b * r <= 128 and 1 - (1 - threshold ** r) ** b >= 0.99


# ---- evaluation data

@pytest.mark.skipif(not (DATA / "gsm8k_test.jsonl").is_file(), reason="no NANOPATH_DATA here")
def test_decontamination_equals_a_slow_comparison_of_sets():
    questions = [json.loads(line) for line in (DATA / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()]
    train = [json.loads(line) for line in (DATA / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()][:1500]
    rng, texts = random.Random(0), [row["question"] + " " + row["answer"] for row in train]
    for i in range(0, len(texts), 10):   # hide some of an evaluation text in each tenth: sometimes 13 words, sometimes 12
        words = re.findall(r"\w+", rng.choice(questions)["question"])
        at = rng.randrange(max(1, len(words) - 13))
        texts[i] += " And: " + ", ".join(words[at:at + 12 + i % 20 // 10])
    known, short = set(), set()
    for row in questions:
        for value in row.values():
            runs = slow_shingles(value, 13)
            (known if len(dedup.words_of(value).split()) >= 13 else short).update(runs)
    short = {run for run in short if len(run.split()) >= 8}
    padded = [b" %s " % dedup.words_of(text) for text in texts]
    want = [not (slow_shingles(text, 13) & known or any(b" %s " % run in words for run in short)) for text, words in zip(texts, padded)]
    rows, report = run(jsonl("in.jsonl", texts), decontaminate=(str(DATA / "gsm8k_test.jsonl"),))
    assert [row["text"] for row in rows] == [text for text, clean in zip(texts, want) if clean]
    assert 60 < len(texts) - len(rows) < 150
    if (DATA / "HumanEval.jsonl.gz").is_file():
        tasks = [json.loads(line)["prompt"] for line in gzip.open(DATA / "HumanEval.jsonl.gz", "rt", encoding="utf-8")]
        rows, report = run(jsonl("in.jsonl", [PROSE, *tasks]), decontaminate=(str(DATA / "HumanEval.jsonl.gz"),))
        assert [row["text"] for row in rows] == [PROSE]


def test_decontamination_by_plain_text_and_short_questions():
    Path("exam.txt").write_text(" ".join(distinct(40)), encoding="utf-8")
    short = "What is the capital of the small country?"
    jsonl("quiz.jsonl", [{"question": short, "choices": ["Too short", "Vaduz is where the prince of that country lives"], "label": 1}])
    texts = [" ".join(distinct(13, 5)), " ".join(distinct(12, 5)), f"He asked: {short.upper()} I knew.", "Too short", PROSE,
             "Vaduz, is where the prince of that country lives!"]
    rows, report = run(jsonl("in.jsonl", texts), decontaminate=("exam.txt", "quiz.jsonl"))
    assert [row["text"] for row in rows] == [texts[1], "Too short", PROSE]
    assert report["dropped"] == {"decontaminate: in an evaluation text": 3}
    assert report["samples"]["decontaminate: in an evaluation text"][1]["text"] == "what is the capital of the small country"


# ---- what a review found

def test_pages_inside_a_form_long_links_and_blank_lines_of_pre():
    body = "<p>" + "A whole page of ASP.NET stands in one form. " * 10 + "</p>"
    assert web.page_text(f"<form>{body}<input></form>")[1].startswith("A whole page")
    assert web.page_text(f"<form>Search <input></form>{body}")[1].startswith("A whole page")
    headlines = "".join(f"<li><a href=x>{i} {'a headline that tells all of the story ' * 4}</a></li>" for i in range(4))
    assert len(web.page_text(f"<ul>{headlines}</ul>")[1].splitlines()) == 4
    assert web.page_text("<pre>a\n\n\n\n  b<br><br>c</pre>")[1] == "a\n\n\n\n  b\n\nc"


def test_compressed_bodies_whole_cut_and_damaged():
    page = b"<p>" + os.urandom(2000).hex().encode()
    raw = zlib.compressobj(wbits=-15)
    raw = raw.compress(page) + raw.flush()
    packed = gzip.compress(page)
    for encoding, body in (("gzip", packed), ("gzip", packed + bytes(9)), ("gzip", page), ("deflate", zlib.compress(page)),
                           ("deflate", raw), ("deflate", page), ("identity", page), ("deflate, gzip", gzip.compress(raw))):
        assert web.http_body({"content-encoding": encoding}, body) == page, encoding
    assert web.http_body({"content-encoding": "gzip"}, packed + packed) == page * 2
    damaged = packed[:300] + bytes(50) + packed[350:]
    for encoding, body in (("gzip", packed[:-9]), ("gzip", damaged), ("deflate", raw[:-9]), ("br", page), ("lzma", page)):
        with pytest.raises(ValueError, match="a page"):
            web.http_body({"content-encoding": encoding}, body)
    for body in (b"5\r\nhello\r\n-5\r\n", b"5\r\nhel"):
        with pytest.raises(ValueError, match="chunks"):
            web.http_body({"transfer-encoding": "chunked"}, body)
    good = http(b"<p>good")
    Path("a.warc").write_bytes(record("response", http(damaged, **{"Content-Encoding": "gzip"})) + record("response", good))
    rows, report = run("a.warc", skip_bad=True)
    assert [row["text"] for row in rows] == ["good"] and report["dropped"] == {"bad row or page": 1}


def test_records_that_are_too_large_cut_or_without_a_length(monkeypatch):
    good = record("response", http(b"<p>good"))
    monkeypatch.setattr(web, "LARGEST", 1 << 16)
    Path("a.warc").write_bytes(record("response", http(bytes(1 << 17))) + good)
    rows, report = run("a.warc", skip_bad=True)
    assert [row["text"] for row in rows] == ["good"] and report["dropped"] == {"bad row or page": 1}
    for name, tail, words in (("b.warc", good[:30], "header"), ("c.warc", b"WARC/1.0\r\nWARC-Type: response\r\n\r\n", "Content-Length"),
                              ("d.warc", b"WARC/1.0\r\nContent-Length: -3\r\n\r\n", "Content-Length")):
        Path(name).write_bytes(good + tail)
        Path("clean.jsonl").unlink(missing_ok=True)
        assert words in refused(name)


def test_decontamination_finds_nested_texts_and_refuses_empty_files():
    question = "What is the name of the seventh river that flows into the old harbour of the city?"
    rows = [{"messages": [{"role": "user", "content": question}]}, {"choices": {"text": [PROSE]}}]
    jsonl("in.jsonl", [f"Before it: {question} Yes.", "x " + PROSE, "nothing of it"])
    for row in rows:
        Path("eval.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        kept, report = run("in.jsonl", decontaminate=("eval.jsonl",))
        assert len(kept) == 2
    Path("clean.jsonl").unlink()
    for content, words in (('{"n": 1}\n', "no text"), ('{"a": "\\ud800"}\n', "lone surrogate"), ("", "no text")):
        Path("eval.jsonl").write_text(content, encoding="utf-8")
        assert words in refused("in.jsonl", decontaminate=("eval.jsonl",))
    for content, words in ((b"\n \n", "no word"), (b"caf\xe9\n", "UTF-8")):
        Path("words.txt").write_bytes(content)
        assert words in refused("in.jsonl", toxic="words.txt")


def test_what_is_written_where_is_checked_first():
    jsonl("in.jsonl", ["a"])
    Path("ok.txt").write_text("mine", encoding="utf-8")
    for flags in (dict(report="in.jsonl"), dict(report="clean.jsonl"), dict(report="ok.txt/x.json"), dict(report=".")):
        assert "--report=" in refused("in.jsonl", **flags)
    with pytest.raises(SystemExit, match="--out=ok.txt/x.jsonl"):
        curate.main(Config(("in.jsonl",), out="ok.txt/x.jsonl"))
    Path("clean.jsonl.new").write_text("mine", encoding="utf-8")
    run("in.jsonl")
    assert Path("clean.jsonl.new").read_text(encoding="utf-8") == "mine"


def test_other_columns_stay_what_they_were():
    Path("in.jsonl").write_text('{"title": "T", "text": "own", "odd": "\\ud83d"}\n', encoding="utf-8")
    assert run("in.jsonl")[0] == [{"text": "own", "title": "T", "odd": "\ud83d"}]
    assert run("in.jsonl", columns="title")[0] == [{"text": "T", "original_text": "own", "odd": "\ud83d"}]


@pytest.mark.parametrize("content, words", [
    (b'[1, {"text": "a"}]', "line 1: not a JSON object"), (b"[" * 100_000, "nested too deep"),
    (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "too many digits"), (b'[{"n": ' + b"1" * 5000 + b"}]", "too many digits"),
])
def test_odd_json_gives_one_line(content, words):
    Path("a.json").write_bytes(content)
    assert words in refused("a.json")
    assert "--encoding=hex" in refused("a.json", encoding="hex")
