"""
HTML pages and WARC archives to text, with the standard library alone.

A page keeps its blocks: one line per paragraph, heading, list item and table row, a blank line around paragraphs and
headings, white space as it is in <pre>. Scripts, menus, page headers and footers, small forms and what is hidden go; so do
runs of short lines that are nothing but links. A WARC file (also .warc.gz of many members, as Common Crawl writes them) gives
the pages among its responses; a WET file is a WARC whose records are text already.
"""
import re
import zlib
from html.parser import HTMLParser

DROPPED = {"script", "style", "noscript", "template", "svg", "iframe", "object", "canvas", "audio", "video", "nav",
           "footer", "aside", "button", "select", "textarea", "dialog", "menu"}
DROPPED_NAMES = {"nav", "navbar", "navigation", "menu", "sidebar", "breadcrumb", "breadcrumbs", "footer", "toc", "cookie",
                 "cookies", "cookie-banner", "share", "social", "advertisement", "ads", "popup", "modal"}  # class or id
LINE = {"li", "tr", "dt", "dd", "div", "section", "article", "main", "header", "figure", "figcaption",
        "address", "summary", "details", "body", "caption", "center"}
PARAGRAPH = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl", "table", "blockquote", "pre", "hr"}
EMPTY = {"br", "hr", "img", "input", "meta", "link", "wbr", "col", "area", "base", "embed", "source", "track", "param"}
CLOSES_ITSELF = {"p", "li", "dt", "dd", "tr", "td", "th", "option"}  # <li>one<li>two
MENU = 3              # so many lines in a row that are only links are a menu,
LONG = 100            # unless they have more characters than the entries of menus
FORM = 200            # a form of fewer characters is a search box; a longer one may be the whole page (ASP.NET)
LARGEST = 64 << 20    # bytes of an unpacked page; more is refused


class TextOfPage(HTMLParser):
    """Collects lines as (text, is it only links?), an empty one where a paragraph begins."""

    def __init__(self):
        super().__init__()
        self.stack = []                # open tags: (tag, what closing it restores)
        self.dropping = False
        self.links = self.pre = self.inside = 0   # depth of <a>, <pre>, <article> or <main>
        self.title, self.lines = [], []
        self.form = None                          # how many lines stand before the <form> at hand
        self.parts, self.linked = [], 0           # of the line at hand, and how much of it is inside links

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
            self.parts.append(" | ")       # the cells of a row stand on one line
        if tag in EMPTY:
            return
        self.stack.append((tag, self.dropping))
        self.links += tag == "a"
        self.inside += tag in ("article", "main")
        self.pre += tag == "pre"
        named = {key: value or "" for key, value in attributes if key in ("class", "id", "role", "style", "aria-hidden")}
        hidden = "hidden" in dict(attributes) or named.get("aria-hidden") == "true"
        hidden |= "display:none" in named.get("style", "").replace(" ", "") or named.get("role") == "navigation"
        names = f"{named.get('class', '')} {named.get('id', '')}".lower().split()
        if tag in DROPPED or tag == "header" and not self.inside or hidden:
            self.dropping = True
        elif tag not in ("html", "body", "main", "article") and not DROPPED_NAMES.isdisjoint(names):
            self.dropping = True

    def parse_marked_section(self, i, report=1):
        return self.parse_bogus_comment(i)     # <![if IE]> ends at the next >, as in browsers; the library would refuse

    def handle_endtag(self, tag):
        if tag in PARAGRAPH or tag in LINE or tag == "form":
            self.new_line(tag in PARAGRAPH)
        if tag == "form" and self.form is not None:
            if sum(len(text) for text, _ in self.lines[self.form:]) < FORM:
                del self.lines[self.form:]
            self.form = None
        for at in range(len(self.stack) - 1, max(-1, len(self.stack) - 100), -1):   # what it closes, if anything
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
        single = [line for line, above in zip(result, ["", *result]) if line or above]     # no two blank lines; <pre> may
        return "\n".join(single).strip("\n")


def page_text(html):
    """(title, text) of an HTML page."""
    parser = TextOfPage()
    parser.feed(html + "<p>")              # not close(): it would look at a tag that never ends again and again, n^2
    return " ".join("".join(parser.title).split()), parser.text()


def decode_page(data, declared=None):
    """Bytes of a page -> str: byte order mark, then the HTTP header's charset, then <meta>, then UTF-8, then cp1252."""
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
    """Yield (headers with names in lower case, payload) of the records of a WARC file that can hold text; the payload of
    one larger than LARGEST is None."""
    while line := file.readline(1 << 16):
        if not line.strip():
            continue                       # two line ends close a record
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
            raise ValueError(f"a record with Content-Length {length!r}: where the next one begins is not known")
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
    """(title, text) of one record; None if it is no text (a picture, an error page, ...). ValueError: too large, damaged."""
    kind = headers.get("content-type", "")
    if payload is None:
        raise ValueError(f"a record of more than {LARGEST >> 20} MB")
    if headers["warc-type"] == "conversion":
        return "", payload.decode("utf-8", "replace")
    if headers["warc-type"] == "response":
        head, _, payload = payload.partition(b"\r\n\r\n")
        status, *lines = head.split(b"\r\n")
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


CHUNK = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r]*)?\r\n")     # the length before each piece of a chunked body
UNPACKED = ("", "identity", "none", "utf-8")                        # the last two by mistake, but often


def http_body(headers, body):
    """Undo chunked transfer and compression, where the archive kept them. ValueError if they are damaged."""
    if "chunked" in headers.get("transfer-encoding", "").lower() and CHUNK.match(body):
        parts, at = [], 0
        while (found := CHUNK.match(body, at)) and (size := int(found[1], 16)):
            parts.append(body[found.end():found.end() + size])
            at = found.end() + size + 2
        if not found:
            raise ValueError("a page whose chunks are damaged or cut short")
        body = b"".join(parts)
    for packed in reversed(headers.get("content-encoding", "").lower().split(",")):      # the last was done last
        packed = packed.strip()
        if packed in ("gzip", "x-gzip"):
            body = unpacked(body, 31) if body[:2] == b"\x1f\x8b" else body               # else the archive undid it
        elif packed == "deflate":
            body = inflated(body)
        elif packed not in UNPACKED:
            raise ValueError(f"a page compressed with {packed}, which is not read")
    return body


def inflated(body):
    """What servers call deflate: by the standard with zlib's header, by others without, or it is undone already."""
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
    """All members of a compressed body. ValueError: it is damaged, cut short, or larger than LARGEST."""
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
