"""
HTML pages and WARC archives to text, with the standard library only.

The text of a page has one line per paragraph, heading, list item and table row, an empty line around paragraphs and
headings, and the white space of <pre>. Dropped are scripts, menus, page headers and footers, small forms, hidden
elements and runs of short lines that consist of links. Of a WARC file (also a .warc.gz of many members, as Common Crawl
writes them) the pages among its responses are read. A WET file is a WARC file whose records are text already.
"""
import re
import zlib
from html.parser import HTMLParser

DROPPED = {"script", "style", "noscript", "template", "svg", "iframe", "object", "canvas", "audio", "video", "nav",
           "footer", "aside", "button", "select", "textarea", "dialog", "menu"}
DROPPED_NAMES = {"nav", "navbar", "navigation", "menu", "sidebar", "breadcrumb", "breadcrumbs", "footer", "toc",
                 "cookie", "cookies", "cookie-banner", "share", "social", "advertisement", "ads", "popup",
                 "modal"}  # values of class or id
LINE = {"li", "tr", "dt", "dd", "div", "section", "article", "main", "header", "figure", "figcaption",
        "address", "summary", "details", "body", "caption", "center"}
PARAGRAPH = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl", "table", "blockquote", "pre", "hr"}
EMPTY = {"br", "hr", "img", "input", "meta", "link", "wbr", "col", "area", "base", "embed", "source", "track", "param"}
CLOSES_ITSELF = {"p", "li", "dt", "dd", "tr", "td", "th", "option"}  # <li>one<li>two
MENU = 3              # this many lines in a row that are only links are a menu
LONG = 100            # characters; a line of more is no menu entry
FORM = 200            # a form of fewer characters is a search box; a longer one may be the whole page (ASP.NET)
LARGEST = 64 << 20    # bytes of a decompressed page; a larger one is refused


class TextOfPage(HTMLParser):
    """Collects lines as (text, is it only links?), with an empty line before each paragraph."""

    def __init__(self):
        super().__init__()
        self.stack = []                # open tags: (tag, what closing it restores)
        self.dropping = False
        self.links = self.pre = self.inside = 0   # depth of <a>, <pre>, <article> or <main>
        self.title, self.lines = [], []
        self.form = None                          # number of lines before the current <form>
        self.parts, self.linked = [], 0           # of the current line, and how many of its characters are in links

    def new_line(self, paragraph=False):
        text = "".join(self.parts)
        text = text.strip("\n").rstrip() if self.pre else " ".join(text.split())
        if text.strip():
            self.lines.append((text, len(text) <= LONG and self.linked > 0.8 * len(text)))
        if paragraph and self.lines and self.lines[-1][0]:
            self.lines.append(("", None))
        self.parts, self.linked = [], 0

    def handle_starttag(self, tag, attributes):
        if self.stack and self.stack[-1][0] == tag and tag in CLOSES_ITSELF:
            self.handle_endtag(tag)
        if tag == "br" and self.pre:
            self.handle_data("\n")
        elif tag == "br":
            self.new_line()
        if tag in PARAGRAPH or tag in LINE or tag == "form":
            self.new_line(tag in PARAGRAPH)
            self.form = len(self.lines) if tag == "form" else self.form
        elif tag in ("td", "th") and self.parts:
            self.parts.append(" | ")       # the cells of a table row share one line
        if tag in EMPTY:
            return
        self.stack.append((tag, self.dropping))
        self.links += tag == "a"
        self.inside += tag in ("article", "main")
        self.pre += tag == "pre"
        keys = ("class", "id", "role", "style", "aria-hidden")
        named = {key: value or "" for key, value in attributes if key in keys}
        hidden = "hidden" in dict(attributes) or named.get("aria-hidden") == "true"
        hidden |= "display:none" in named.get("style", "").replace(" ", "") or named.get("role") == "navigation"
        names = f"{named.get('class', '')} {named.get('id', '')}".lower().split()
        if tag in DROPPED or tag == "header" and not self.inside or hidden:
            self.dropping = True
        elif tag not in ("html", "body", "main", "article") and not DROPPED_NAMES.isdisjoint(names):
            self.dropping = True

    def parse_marked_section(self, i, report=1):
        return self.parse_bogus_comment(i)     # <![if IE]> ends at the next >, as in browsers; HTMLParser would fail

    def handle_endtag(self, tag):
        if tag in PARAGRAPH or tag in LINE or tag == "form":
            self.new_line(tag in PARAGRAPH)
        if tag == "form" and self.form is not None:
            if sum(len(text) for text, _ in self.lines[self.form:]) < FORM:
                del self.lines[self.form:]
            self.form = None
        for at in range(len(self.stack) - 1, max(-1, len(self.stack) - 100), -1):   # find the tag that it closes
            if self.stack[at][0] == tag:
                for name, dropping in reversed(self.stack[at:]):
                    self.dropping = dropping
                    self.links -= name == "a"
                    self.pre -= name == "pre"
                    self.inside -= name in ("article", "main")
                del self.stack[at:]
                break

    def handle_data(self, data):
        if self.stack and self.stack[-1][0] == "title" and not self.dropping:
            self.title.append(data)
        elif not self.dropping:
            self.parts.append(data)
            self.linked += len(data.strip()) if self.links else 0

    def text(self):
        self.new_line()
        result, run = [], []
        for text, only_links in [*self.lines, ("", False)]:
            if only_links or only_links is None and run:
                run.append(text)
                continue
            result += run if sum(map(bool, run)) < MENU else []
            run = []
            result.append(text)
        single = [line for line, above in zip(result, ["", *result]) if line or above]     # no two empty lines
        return "\n".join(single).strip("\n")


def page_text(html):
    """(title, text) of an HTML page."""
    parser = TextOfPage()
    parser.feed(html + "<p>")              # not close(), which takes n^2 steps for a tag that never ends
    return " ".join("".join(parser.title).split()), parser.text()


def decode_page(data, declared=None):
    """Bytes of a page -> str, by (in this order) byte order mark, HTTP header, <meta>, UTF-8, cp1252."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    found = re.search(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?\s*([\w.:-]+)", data[:4096], re.I)
    name = (declared or (found[1].decode("ascii") if found else "")).lower()
    name = "cp1252" if name in ("iso-8859-1", "latin-1", "latin1", "us-ascii", "ascii") else name   # as browsers do
    try:
        return data.decode(name or "utf-8-sig", "replace" if name else "strict")
    except (LookupError, UnicodeDecodeError):
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            return data.decode("cp1252", "replace")


# ---- WARC

def warc_records(file):
    """Yield (headers with names in lower case, payload) of the records of a WARC file that can hold text. The payload
    is None where it is larger than LARGEST.

    warcio was measured instead (2026-11-25, 1,500 pages, 30 MB): 1.15 times our processor time, and it returns damaged
    bodies (a cut gzip stream, cut chunks, brotli without its package) without an error."""
    while line := file.readline(1 << 16):
        if not line.strip():
            continue                       # two line ends follow each record
        if not line.startswith(b"WARC/"):
            raise ValueError(f"not a WARC file: a record begins with {line[:20]!r}")
        lines = []
        while (line := file.readline(1 << 16)).rstrip(b"\r\n"):
            lines.append(line.rstrip(b"\r\n"))
        if not line:
            raise EOFError("its last record ends in the header")
        headers = header_lines(lines)
        length = headers.get("content-length", "")
        if not re.fullmatch(r"[0-9]{1,15}", length):
            raise ValueError(f"a record with Content-Length {length!r}, so the start of the next record is unknown")
        left = int(length)
        wanted = headers.get("warc-type") in ("response", "conversion", "resource")
        large, parts = left > LARGEST, []
        while left:
            part = file.read(min(left, 1 << 20))
            if not part:
                raise EOFError("its last record has no end")
            left -= len(part)
            if wanted and not large:
                parts.append(part)
        if wanted:
            yield headers, None if large else b"".join(parts)


def header_lines(lines):
    pairs = (line.decode("utf-8", "replace").partition(":") for line in lines)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def warc_text(headers, payload):
    """(title, text) of one record, None if it is not text (a picture, an error page). ValueError: large or damaged."""
    kind = headers.get("content-type", "")
    if payload is None:
        raise ValueError(f"a record of more than {LARGEST >> 20} MB")
    if headers["warc-type"] == "conversion":
        return "", payload.decode("utf-8", "replace")
    if headers["warc-type"] == "response":
        head, *rest = re.split(rb"\r?\n\r?\n", payload, maxsplit=1)      # some servers send \n without \r
        payload = rest[0] if rest else b""
        status, *lines = head.splitlines()
        http = header_lines(lines)
        if status.split(b" ")[1:2] != [b"200"]:
            return None
        payload = http_body(http, payload)
        kind = http.get("content-type", "")
    kind, _, rest = kind.lower().partition(";")
    charset = re.search(r"charset=[\"']?([\w.:-]+)", rest)
    if kind.strip() in ("text/html", "application/xhtml+xml"):
        return page_text(decode_page(payload, charset and charset[1]))
    if kind.strip() == "text/plain":
        return "", decode_page(payload, charset and charset[1])
    return None


CHUNK_HEAD = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r]*)?\r\n")     # the length before each chunk of a body
UNPACKED = ("", "identity", "none", "utf-8")                        # servers often send the last two by mistake


def http_body(headers, body):
    """Undo chunked transfer and compression where the archive kept them. ValueError if the body is damaged."""
    if "chunked" in headers.get("transfer-encoding", "").lower() and CHUNK_HEAD.match(body):
        parts, at = [], 0
        while (found := CHUNK_HEAD.match(body, at)) and (size := int(found[1], 16)):
            parts.append(body[found.end():found.end() + size])
            at = found.end() + size + 2
        if not found:
            raise ValueError("a page whose chunks are damaged or cut short")
        body = b"".join(parts)
    for packed in reversed(headers.get("content-encoding", "").lower().split(",")):      # the last was done last
        packed = packed.strip()
        if packed in ("gzip", "x-gzip"):
            body = unpacked(body, 31) if body[:2] == b"\x1f\x8b" else body               # else it is undone already
        elif packed == "deflate":
            body = inflated(body)
        elif packed not in UNPACKED:
            raise ValueError(f"a page compressed with {packed}; only gzip and deflate can be read")
    return body


def inflated(body):
    """Content-Encoding: deflate has zlib's header by the standard; some servers leave it out or do not compress."""
    try:
        return unpacked(body, 15)
    except ValueError as error:
        try:
            return unpacked(body, -15)
        except ValueError:
            if body.lstrip()[:1] == b"<":
                return body
            raise error from None


def unpacked(body, wbits):
    """All members of a compressed body. ValueError if it is damaged, cut short, or larger than LARGEST."""
    parts, size = [], 0
    while body:
        unpack = zlib.decompressobj(wbits)
        try:
            parts.append(unpack.decompress(body, LARGEST + 1 - size))
        except zlib.error as error:
            raise ValueError(f"a page whose compression is damaged ({error})") from None
        size += len(parts[-1])
        if size > LARGEST:
            raise ValueError(f"a page of more than {LARGEST >> 20} MB")
        if not unpack.eof:
            raise ValueError("a page whose compressed body is cut short")
        body = unpack.unused_data if unpack.unused_data[:2] == b"\x1f\x8b" else b""
    return b"".join(parts)
