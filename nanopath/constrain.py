"""
Structured output: which tokens may come next, so that every text a model writes is JSON, obeys a JSON schema, or matches
a regular expression.

    expression or schema -> nodes (bytes, sequence, choice, repeat) -> states, made when they are first met
    state, number of tokens left -> the ids that may follow;   state, id -> the next state

A node is a piece of grammar over bytes. A cell is a node and what must follow it, a linked list, so that sequences need
no copying. A state is the set of cells that the text so far may be in (the subset construction of Thompson 1968), and
what follows a state on each byte is one row of a table. The mask over the vocabulary walks all tokens through that table
at once, byte by byte, in numpy: 2 ms for 50,000 tokens the first time, nothing when the state comes again.
Every cell knows the fewest bytes to its end. A token is only allowed if the text can still be finished afterwards with
the tokens that are left, and every byte is a token: so no output is ever cut off in the middle.

Regular expressions: those of Python's re with re.ASCII, matched in full: | ( ) (?: ) . [ ] [^ ] \\d \\w \\s \\D \\W \\S
    * + ? {m,n}, ^ at the start and $ at the end. Refused: back-references, look-around, \\b, flags.
JSON schemas: type (or a list of types), properties, required, additionalProperties, items, prefixItems, minItems,
    maxItems, enum, const, anyOf, $ref (local, 16 levels of recursion), pattern, minLength, maxLength, minimum and maximum
    of integers; title, description, default, examples, format and the like are ignored as mere remarks. Every other
    keyword is refused by name. Objects are written with their properties in the order of the schema and no others.

Read    Nodes, then Constraint; sample.py uses it: python sample.py --schema=FILE
Papers  masking by an automaton over the vocabulary (Willard and Louf, arXiv:2307.09702)
"""
import json
import re
import warnings
from collections import OrderedDict

import numpy as np
import torch

LAST = 0x10FFFF                                                    # of all characters
ANY = [(0, LAST)]
DIGIT, SPACE = [(48, 57)], [(9, 13), (32, 32)]
WORD = [(48, 57), (65, 90), (95, 95), (97, 122)]
NEVER = float("inf")                                               # bytes to finish what cannot be finished
DEPTH = 16                                                         # how deep generic JSON and $ref may nest
CROWD = 20_000                                                     # cells in a state before we give up


def union(ranges):
    """Ranges of code points -> the same set, sorted and without overlaps."""
    merged = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        elif low <= high:
            merged.append((low, high))
    return merged


def complement(ranges):
    edges = [-1, *(edge for low, high in union(ranges) for edge in (low, high)), LAST + 1]
    return [(low + 1, high - 1) for low, high in zip(edges[::2], edges[1::2]) if low + 1 < high]


def without(ranges, others):
    return complement([*complement(ranges), *others])


# ---------------------------------------------------------------------------------------------------------------------
# Nodes

class Nodes:
    """Pieces of grammar, each a number. Equal pieces have equal numbers, so shared parts exist once.

    kinds: ("bytes", mask) one byte of a set, bit b of mask; ("seq", ...); ("alt", ...), alt() matches nothing;
    ("repeat", node, low, high), high None: without end. shortest[node]: fewest bytes that match it.
    """
    def __init__(self):
        self.number, self.kind, self.shortest = {}, [], []

    def node(self, *kind):
        if kind not in self.number:
            self.number[kind] = len(self.kind)
            self.kind.append(kind)
            length = self.shortest
            length.append({"bytes": lambda: 1, "seq": lambda: sum(length[part] for part in kind[1:]),
                           "alt": lambda: min([length[part] for part in kind[1:]], default=NEVER),
                           "repeat": lambda: kind[2] and kind[2] * length[kind[1]]}[kind[0]]())
        return self.number[kind]

    def byte_range(self, low, high):
        return self.node("bytes", (1 << high + 1) - (1 << low))

    def seq(self, *parts):
        return parts[0] if len(parts) == 1 else self.node("seq", *parts)

    def alt(self, *parts):
        parts = [part for part in dict.fromkeys(parts) if self.shortest[part] < NEVER]
        return parts[0] if len(parts) == 1 else self.node("alt", *parts)

    def repeat(self, part, low=0, high=None):
        return self.node("repeat", part, low, high)

    def maybe(self, part):
        return self.repeat(part, 0, 1)

    def text(self, text):
        return self.seq(*(self.byte_range(b, b) for b in text.encode("utf-8")))

    def chars(self, ranges):
        """One character of these ranges of code points, as UTF-8. Halves of surrogate pairs are no characters."""
        parts, single = [], 0
        for low, high in without(ranges, [(0xD800, 0xDFFF)]):
            if low < 0x80:
                single |= (1 << min(high, 0x7F) + 1) - (1 << low)
            for first, last in ((0x80, 0x7FF), (0x800, 0xFFFF), (0x10000, LAST)):      # of 2, 3, 4 bytes
                a, b = max(low, first), min(high, last)
                if a <= b:
                    parts.append(self.between(chr(a).encode("utf-8"), chr(b).encode("utf-8")))
        return self.alt(*[self.node("bytes", single)] * bool(single), *parts)

    def between(self, low, high):
        """UTF-8 sequences of one length from low to high: the first bytes in turn, the rest of each free or bounded."""
        if len(low) == 1:
            return self.byte_range(low[0], high[0])
        least, most = b"\x80" * (len(low) - 1), b"\xbf" * (len(low) - 1)
        if low[0] == high[0]:
            return self.seq(self.byte_range(low[0], low[0]), self.between(low[1:], high[1:]))
        parts, first, last = [], low[0], high[0]
        if low[1:] != least:
            parts.append(self.seq(self.byte_range(first, first), self.between(low[1:], most)))
            first += 1
        if high[1:] != most:
            parts.append(self.seq(self.byte_range(last, last), self.between(least, high[1:])))
            last -= 1
        if first <= last:
            parts.append(self.seq(self.byte_range(first, last), self.between(least, most)))
        return self.alt(*parts)

    def quoted(self, ranges):
        """One character as it stands inside a JSON string: most as they are, some only with a backslash."""
        special = [i for i in (*range(32), ord('"'), ord("\\")) if any(low <= i <= high for low, high in ranges)]
        plain = without(ranges, [(0, 31), (34, 34), (92, 92)])
        return self.alt(self.chars(plain), *(self.text(json.dumps(chr(i))[1:-1]) for i in special))


# ---------------------------------------------------------------------------------------------------------------------
# Regular expressions

class Expression:
    """Recursive descent over a regular expression: choice, sequence, atom with its quantifier."""
    escapes = {"n": 10, "t": 9, "r": 13, "f": 12, "v": 11, "a": 7}
    classes = {"d": DIGIT, "w": WORD, "s": SPACE, "D": complement(DIGIT), "W": complement(WORD), "S": complement(SPACE)}

    def __init__(self, nodes, pattern, quoted=False):
        self.nodes, self.pattern, self.at = nodes, pattern, 0
        self.one = nodes.quoted if quoted else nodes.chars
        try:
            with warnings.catch_warnings():                        # [[a] and the like may once mean something else in re
                warnings.simplefilter("ignore", FutureWarning)
                re.compile(pattern, re.ASCII)                      # its messages for what is no expression at all
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"regular expression {pattern!r}: {error}") from None

    def refuse(self, what):
        raise ValueError(f"regular expression {self.pattern!r}: {what} at position {self.at} is not supported. "
                         "Supported: | ( ) (?: ) . [ ] \\d \\w \\s * + ? {m,n}, ^ at the start, $ at the end")

    def peek(self, text):
        return self.pattern.startswith(text, self.at)

    def take(self, text):
        found = self.peek(text)
        self.at += len(text) * found
        return found

    def parse(self):
        self.take("^") or self.take("\\A")
        node = self.choice()
        assert self.at == len(self.pattern), (self.pattern, self.at)
        return node

    def choice(self):
        parts = [self.sequence()]
        while self.take("|"):
            parts.append(self.sequence())
        return self.nodes.alt(*parts)

    def sequence(self):
        parts = []
        while self.at < len(self.pattern) and not self.peek("|") and not self.peek(")"):
            if self.pattern[self.at:] in ("$", "\\Z"):
                self.at = len(self.pattern)
                break
            parts.append(self.quantified(self.atom()))
        return self.nodes.seq(*parts)

    def quantified(self, node):
        counts = re.compile(r"\{(?!\})(\d*)(,?)(\d*)\}").match(self.pattern, self.at)
        if counts:
            low, comma, high = counts.groups()
            low, high = int(low or 0), int(high) if high else None if comma else int(low)
            self.at = counts.end()
        elif self.at < len(self.pattern) and self.pattern[self.at] in "*+?":
            low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}[self.pattern[self.at]]
            self.at += 1
        else:
            return node
        if self.peek("+"):
            self.refuse("a possessive quantifier")
        self.take("?")                                             # lazy or greedy: the same texts match
        return self.nodes.repeat(node, low, high)

    def atom(self):
        if self.take("("):
            name = re.compile(r"\?P<\w+>|\?:").match(self.pattern, self.at)
            if self.peek("?") and not name:
                self.refuse("(?")
            self.at = name.end() if name else self.at
            node = self.choice()
            self.take(")")
            return node
        if self.take("["):
            return self.one(self.bracket())
        if self.take("."):
            return self.one(complement([(10, 10)]))
        if self.peek("^") or self.peek("$"):
            self.refuse(self.pattern[self.at])
        return self.one(self.symbol())

    def bracket(self):
        negated, ranges, first = self.take("^"), [], True
        while first or not self.take("]"):
            first = False
            low = self.symbol()
            if self.peek("-") and not self.peek("-]"):
                self.at += 1
                low = [(low[0][0], self.symbol()[0][0])]
            ranges += low
        return complement(ranges) if negated else union(ranges)

    def symbol(self):
        """One character or class, escaped or not, as ranges."""
        if not self.take("\\"):
            self.at += 1
            code = ord(self.pattern[self.at - 1])
            return [(code, code)]
        letter = self.pattern[self.at]
        if letter in self.classes:
            self.at += 1
            return self.classes[letter]
        digits = {"x": 2, "u": 4, "U": 8}.get(letter)
        if digits:
            code = int(self.pattern[self.at + 1:self.at + 1 + digits], 16)
            self.at += 1 + digits
            return [(code, code)]
        if letter.isalnum() and letter not in self.escapes:
            self.refuse(f"\\{letter}")
        self.at += 1
        code = self.escapes.get(letter, ord(letter))
        return [(code, code)]


# ---------------------------------------------------------------------------------------------------------------------
# JSON and JSON schemas

REMARKS = {"title", "description", "default", "examples", "format", "deprecated", "readOnly", "writeOnly", "$schema",
           "$id", "$anchor", "$comment", "$defs", "definitions"}
KEYWORDS = {"string": {"pattern", "minLength", "maxLength"}, "integer": {"minimum", "maximum"}, "number": set(),
            "boolean": set(), "null": set(), "array": {"items", "prefixItems", "minItems", "maxItems"},
            "object": {"properties", "required", "additionalProperties"}}
ALWAYS = REMARKS | {"type", "enum", "const", "anyOf", "$ref"}


def same(a, b):
    """Equal in JSON, where 1 is 1.0 but not true."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def is_a(kind, value):
    """Is it of this type of JSON schema, where 1.0 is an integer?"""
    if isinstance(value, bool):
        return kind == "boolean"
    python = {"string": str, "integer": int, "number": (int, float), "null": type(None), "array": list, "object": dict}
    return isinstance(value, python.get(kind, ())) or kind == "integer" and isinstance(value, float) and value.is_integer()


class Schema:
    """A JSON schema -> nodes. All recursion is counted down from DEPTH, so the grammar is finite: what is nested too
    deeply becomes the empty choice, and the fewest bytes to the end keep the text out of it."""
    def __init__(self, nodes, schema):
        self.nodes, self.root, self.known = nodes, schema, {}
        n = nodes
        # one blank, or a new line with its indentation: enough to be pretty, too little to babble in
        self.blank = n.alt(n.maybe(n.text(" ")), n.seq(n.text("\n"), n.repeat(n.text(" "), 0, 16)))
        hexadecimal = n.chars([(48, 57), (65, 70), (97, 102)])
        digit = n.chars(DIGIT)
        whole = n.alt(n.text("0"), n.seq(n.chars([(49, 57)]), n.repeat(digit, 0, 14)))      # exact in a double
        self.integer = n.seq(n.maybe(n.text("-")), whole)
        self.number = n.seq(self.integer, n.maybe(n.seq(n.text("."), n.repeat(digit, 1, 15))),
                            n.maybe(n.seq(n.chars([(69, 69), (101, 101)]), n.maybe(n.chars([(43, 43), (45, 45)])),
                                          n.repeat(digit, 1, 2))))
        unit = n.alt(n.seq(n.chars([(48, 57), (65, 67), (69, 70), (97, 99), (101, 102)]), n.repeat(hexadecimal, 3, 3)),
                     n.seq(n.chars([(68, 68), (100, 100)]), n.chars([(48, 55)]), n.repeat(hexadecimal, 2, 2)))
        self.character = n.alt(n.quoted(ANY), n.text("\\/"), n.seq(n.text("\\u"), unit))
        self.string = n.seq(n.text('"'), n.repeat(self.character), n.text('"'))

    def fail(self, where, what):
        raise ValueError(f"JSON schema at {where or 'the top'}: {what}")

    def compile(self, schema, where="", depth=DEPTH):
        """The node of what `schema` allows. `where` names it in messages, `depth` is how much nesting is left."""
        n = self.nodes
        if schema is True or schema == {}:
            return self.anything(depth)
        if schema is False or depth < 0:
            return n.alt()
        if not isinstance(schema, dict):
            self.fail(where, f"{schema!r} is not a schema")
        if "$ref" in schema:
            self.expect(schema, REMARKS | {"$ref"}, where)
            return self.reference(schema["$ref"], where, depth - 1)
        if "const" in schema or "enum" in schema:
            self.expect(schema, REMARKS | {"const", "enum", "type"}, where)
            return self.literals(schema, where)
        if "anyOf" in schema:
            self.expect(schema, REMARKS | {"anyOf"}, where)
            parts = self.of_type(schema, "anyOf", list, where)
            return n.alt(*(self.compile(part, f"{where}/anyOf/{i}", depth) for i, part in enumerate(parts)))
        types = self.types(schema, where)
        if "type" not in schema:                                   # not said, but meant: by the words it uses
            types = [kind for kind in types if KEYWORDS[kind] & schema.keys()] or types
        self.expect(schema, ALWAYS.union(*(KEYWORDS[kind] for kind in types)), where)
        return n.alt(*(getattr(self, f"a_{kind}")(schema, where, depth) for kind in types))

    def types(self, schema, where):
        types = schema.get("type", list(KEYWORDS))
        types = types if isinstance(types, list) else [types]
        for kind in types:
            if not isinstance(kind, str) or kind not in KEYWORDS:
                self.fail(where, f"type {kind!r}; choose among {', '.join(KEYWORDS)}")
        return types

    def expect(self, schema, allowed, where):
        odd = sorted(schema.keys() - allowed)
        if odd:
            self.fail(where, f"the keyword {odd[0]!r} is not supported here. Supported: {', '.join(sorted(allowed - REMARKS))}")

    def of_type(self, schema, key, kind, where, default=None):
        value = schema.get(key, default)
        if not isinstance(value, kind) or isinstance(value, bool) and kind is int or kind is int and value < 0:
            self.fail(where, f"{key}={value!r} must be {'a number, 0 or more' if kind is int else 'of type ' + kind.__name__}")
        return value

    def reference(self, pointer, where, depth):
        if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
            self.fail(where, f"$ref={pointer!r}: only references within the schema, #/...")
        target = self.root
        for part in pointer.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            target = target[int(part)] if isinstance(target, list) and part.isdigit() and int(part) < len(target) else \
                target.get(part) if isinstance(target, dict) else None
        if target is None:
            self.fail(where, f"$ref={pointer!r}: there is nothing")
        if (pointer, depth) not in self.known:
            self.known[pointer, depth] = self.compile(target, pointer, depth)
        return self.known[pointer, depth]

    def literals(self, schema, where):
        values = [schema["const"]] if "const" in schema else self.of_type(schema, "enum", list, where)
        if "enum" in schema:
            others = self.of_type(schema, "enum", list, where)
            values = [value for value in values if any(same(value, other) for other in others)]
        kinds = self.types(schema, where)
        values = [value for value in values if any(is_a(kind, value) for kind in kinds)]
        try:
            return self.nodes.alt(*(self.nodes.text(json.dumps(v, ensure_ascii=False, allow_nan=False)) for v in values))
        except ValueError as error:
            self.fail(where, f"{values!r} is not JSON ({error})")

    def anything(self, depth):
        """Any JSON value, `depth` levels deep at most."""
        if ("any", depth) not in self.known:
            n = self.nodes
            parts = [self.string, self.number, n.text("true"), n.text("false"), n.text("null")]
            if depth > 0:
                inner = self.anything(depth - 1)
                parts += [self.list_of([], inner, 0, None), self.map_of(inner)]
            self.known["any", depth] = n.alt(*parts)
        return self.known["any", depth]

    def a_string(self, schema, where, depth):
        n = self.nodes
        low, high = self.of_type(schema, "minLength", int, where, 0), schema.get("maxLength")
        if "pattern" in schema:
            if low or high is not None:
                self.fail(where, "pattern together with minLength or maxLength is not supported; put {m,n} into the pattern")
            pattern = Expression(n, self.of_type(schema, "pattern", str, where), quoted=True).parse()
            return n.seq(n.text('"'), pattern, n.text('"'))
        if high is not None and self.of_type(schema, "maxLength", int, where) < low:
            return n.alt()
        return n.seq(n.text('"'), n.repeat(self.character, low, high), n.text('"'))

    def a_integer(self, schema, where, depth):
        if "minimum" not in schema and "maximum" not in schema:
            return self.integer
        bounds = [schema.get("minimum", -10 ** 15 + 1), schema.get("maximum", 10 ** 15 - 1)]
        if not all(type(bound) is int and abs(bound) < 10 ** 15 for bound in bounds):
            self.fail(where, f"minimum and maximum must be integers of at most 15 digits, they are {bounds}")
        low, high = bounds
        n = self.nodes
        negative = n.seq(n.text("-"), self.decimals(max(1, -high), -low)) if low < 0 else n.alt()
        return n.alt(negative, self.decimals(max(0, low), high))

    def decimals(self, low, high):
        """The whole numbers from low to high, 0 <= low, digit by digit, by their number of digits."""
        n, parts = self.nodes, []
        for digits in range(len(str(low)), len(str(max(high, 0))) + 1):
            a, b = max(low, 10 ** (digits - 1) if digits > 1 else 0), min(high, 10 ** digits - 1)
            if a <= b:
                parts.append(self.digits_between(str(a), str(b)))
        return n.alt(*parts)

    def digits_between(self, low, high):
        n = self.nodes
        if not low:
            return n.seq()
        if low == "0" * len(low) and high == "9" * len(high):
            return n.repeat(n.chars(DIGIT), len(low), len(low))
        if low[0] == high[0]:
            return n.seq(n.text(low[0]), self.digits_between(low[1:], high[1:]))
        parts = [n.seq(n.text(low[0]), self.digits_between(low[1:], "9" * (len(low) - 1))),
                 n.seq(n.text(high[0]), self.digits_between("0" * (len(low) - 1), high[1:]))]
        if int(low[0]) + 1 < int(high[0]):
            parts.append(n.seq(n.chars([(ord(low[0]) + 1, ord(high[0]) - 1)]),
                               n.repeat(n.chars(DIGIT), len(low) - 1, len(low) - 1)))
        return n.alt(*parts)

    def a_number(self, schema, where, depth):
        if "minimum" in schema or "maximum" in schema:
            self.fail(where, "minimum and maximum are only supported for type integer")
        return self.number

    def a_boolean(self, schema, where, depth):
        return self.nodes.alt(self.nodes.text("true"), self.nodes.text("false"))

    def a_null(self, schema, where, depth):
        return self.nodes.text("null")

    def list_of(self, first, item, low, high):
        """[a, b, c, ...]: the nodes `first` in turn, then any number of `item`; `low` to `high` values in all."""
        n = self.nodes
        comma = n.seq(n.text(","), self.blank)
        if high is not None and high < low:
            return n.alt()
        count = len(first) if high is None else min(len(first), high)
        if count == high:
            rest = n.seq()
        elif count:
            rest = n.repeat(n.seq(comma, item), max(0, low - count), high and high - count)
        else:
            some = n.seq(item, n.repeat(n.seq(comma, item), max(0, low - 1), high and high - 1))
            rest = some if low else n.maybe(some)
        for i in reversed(range(count)):                           # rest: what may stand after i + 1 values, then after i
            rest = n.seq(*[comma] * (i > 0), first[i], rest)
            rest = n.maybe(rest) if i >= low else rest
        return n.seq(n.text("["), self.blank, rest, self.blank, n.text("]"))

    def map_of(self, value):
        n = self.nodes
        pair = n.seq(self.string, n.text(":"), self.blank, value)
        pairs = n.seq(pair, n.repeat(n.seq(n.text(","), self.blank, pair)))
        return n.seq(n.text("{"), self.blank, n.maybe(pairs), self.blank, n.text("}"))

    def a_array(self, schema, where, depth):
        low = self.of_type(schema, "minItems", int, where, 0)
        high = self.of_type(schema, "maxItems", int, where) if "maxItems" in schema else None
        first = [self.compile(part, f"{where}/prefixItems/{i}", depth - 1)
                 for i, part in enumerate(self.of_type(schema, "prefixItems", list, where, []))]
        item = self.compile(schema.get("items", True), f"{where}/items", depth - 1)
        return self.list_of(first, item, low, high)

    def a_object(self, schema, where, depth):
        n = self.nodes
        properties = self.of_type(schema, "properties", dict, where, {})
        required = self.of_type(schema, "required", list, where, [])
        if not all(isinstance(name, str) for name in required):
            self.fail(where, f"required={required!r} must hold strings only")
        other = schema.get("additionalProperties", True)
        if not properties and not required:
            return self.map_of(self.compile(other, f"{where}/additionalProperties", depth - 1))
        properties = properties | {name: other for name in required if name not in properties}
        pairs = []
        for name, inner in properties.items():
            key = n.seq(n.text(json.dumps(name, ensure_ascii=False)), n.text(":"), self.blank)
            pairs.append((n.seq(key, self.compile(inner, f"{where}/properties/{name}", depth - 1)), name in required))
        comma = n.seq(n.text(","), self.blank)
        first = later = n.seq()                                    # what may still follow when no pair, or one, is written
        for pair, needed in reversed(pairs):
            here, after = n.seq(pair, later), n.seq(comma, pair, later)
            first, later = (here, after) if needed else (n.alt(here, first), n.alt(after, later))
        return n.seq(n.text("{"), self.blank, first, self.blank, n.text("}"))


# ---------------------------------------------------------------------------------------------------------------------
# States, and the mask over the vocabulary

class Constraint:
    """start: the first state. allowed(state, left) -> ids; step(state, id) -> state; ends(state).

    what: "json", a JSON schema (a dict), or a regular expression (any other str). tokenizer: gives the bytes of each id.
    ValueError for what is not supported, or what no text can satisfy.
    """
    def __init__(self, what, tokenizer):
        self.nodes = Nodes()
        if what == "json":
            root = Schema(self.nodes, True).compile(True)
        elif isinstance(what, (dict, bool)):
            root = Schema(self.nodes, what).compile(what)
        else:
            root = Expression(self.nodes, what).parse()
        if self.nodes.shortest[root] == NEVER:
            raise ValueError("no finite text satisfies this schema or expression")
        tokens = sorted(tokenizer.tokens.items(), key=lambda item: item[1])
        missing = [b for b in range(256) if bytes([b]) not in tokenizer.tokens
                   and any(kind[0] == "bytes" and kind[1] >> b & 1 for kind in self.nodes.kind)]
        if missing:
            raise ValueError(f"the vocabulary has no token for the byte {missing[0]:#04x}, which this text may need")
        self.bytes_of = {i: token for token, i in tokens}
        self.ids = np.array([i for _, i in tokens])
        self.length = np.array([len(token) for token, _ in tokens])
        self.offset = np.cumsum(self.length) - self.length
        self.data = np.frombuffer(b"".join(token for token, _ in tokens), dtype=np.uint8)

        self.cells, self.cell_of, self.bytes_left = [None], {}, [0]     # cell 0 is the end of the text
        self.states, self.state_of = [], {}
        self.table = np.full((256, 256), -1, dtype=np.int32)       # state, byte -> state, -1: not allowed
        self.built = np.zeros(256, dtype=bool)                     # which rows of it are filled in
        self.fewest = np.zeros(256)                                # state -> fewest bytes to an end
        self.masks = OrderedDict()
        self.start = self.state(self.closure([self.cell(root, 0)]))
        self.shortest = int(self.fewest[self.start])

    def cell(self, node, rest):
        key = (node, rest)
        if key not in self.cell_of:
            self.cell_of[key] = len(self.cells)
            self.cells.append(key)
            self.bytes_left.append(self.nodes.shortest[node] + self.bytes_left[rest])
        return self.cell_of[key]

    def closure(self, cells):
        """All cells that wait for a byte (or are the end), reached from these without reading one."""
        todo, seen, waiting = list(cells), set(cells), []
        while todo:
            cell = todo.pop()
            if cell == 0 or self.nodes.kind[self.cells[cell][0]][0] == "bytes":
                waiting.append(cell)
                continue
            node, rest = self.cells[cell]
            kind, *parts = self.nodes.kind[node]
            if kind == "seq":
                for part in reversed(parts):
                    rest = self.cell(part, rest)
                found = [rest]
            elif kind == "alt":
                found = [self.cell(part, rest) for part in parts]
            else:
                part, low, high = parts
                again = self.nodes.repeat(part, max(0, low - 1), high if high is None else high - 1)
                found = [self.cell(part, self.cell(again, rest))] * (high != 0) + [rest] * (low == 0)
            for cell in found:
                if cell not in seen and self.bytes_left[cell] < NEVER:
                    seen.add(cell)
                    todo.append(cell)
            if len(seen) > CROWD:
                raise ValueError("this expression is too ambiguous: it repeats what is itself repeated many times")
        return tuple(sorted(waiting))

    def state(self, cells):
        """The number of a set of cells; -1 if it is empty."""
        if not cells:
            return -1
        if cells not in self.state_of:
            number = self.state_of[cells] = len(self.states)
            self.states.append(cells)
            if number == len(self.table):
                self.table = np.concatenate([self.table, np.full_like(self.table, -1)])
                self.built = np.concatenate([self.built, np.zeros_like(self.built)])
                self.fewest = np.concatenate([self.fewest, np.zeros_like(self.fewest)])
            self.fewest[number] = min(self.bytes_left[cell] for cell in cells)
        return self.state_of[cells]

    def build(self, state):
        """Fill in a row of the table. The bytes are first parted into sets that all cells treat alike."""
        parts = [((1 << 256) - 1, ())]
        for cell in self.states[state]:
            if cell:
                node, rest = self.cells[cell]
                mask = self.nodes.kind[node][1]
                parts = [part for old, after in parts for part in ((old & mask, after + (rest,)), (old & ~mask, after))
                         if part[0]]
        for mask, after in parts:
            target = self.state(self.closure(sorted(set(after)))) if after else -1
            bits = np.unpackbits(np.frombuffer(mask.to_bytes(32, "little"), dtype=np.uint8), bitorder="little")
            self.table[state, bits.astype(bool)] = target
        self.built[state] = True

    def walk(self, state):
        """Every token that the table allows from here: its id, and the fewest bytes to an end after it."""
        alive, current, at = np.arange(len(self.ids)), np.full(len(self.ids), state), 0
        ids, fewest = [], []
        while len(alive):
            for missing in np.unique(current[~self.built[current]]):
                self.build(missing)
            current = self.table[current, self.data[self.offset[alive] + at]]
            live = current >= 0
            alive, current, at = alive[live], current[live], at + 1
            done = self.length[alive] == at
            ids.append(self.ids[alive[done]])
            fewest.append(self.fewest[current[done]])
            alive, current = alive[~done], current[~done]
        return torch.from_numpy(np.concatenate(ids)), torch.from_numpy(np.concatenate(fewest))

    def allowed(self, state, left):
        """Ids that may be the next of `left` tokens: afterwards left - 1 tokens, a byte each, still reach an end."""
        if state not in self.masks:
            self.masks[state] = (*(found := self.walk(state)), found[1].max().item() if len(found[1]) else 0)
            if len(self.masks) > 256:                              # 50,000 ids are 0.8 MB
                self.masks.popitem(last=False)
        ids, fewest, most = self.masks[state]
        return ids if most < left else ids[fewest < left]

    def step(self, state, token):
        for b in self.bytes_of[token]:
            if not self.built[state]:
                self.build(state)
            state = int(self.table[state, b])
        return state

    def ends(self, state):
        """May the text end here?"""
        return self.states[state][0] == 0
