"""
The texts that a regular expression or a JSON schema allows, as a grammar over bytes. constrain.py writes with it.

    Expression, Schema -> Nodes: bytes, sequence, choice, repeat, reference

Regular expressions: those of Python's re with re.ASCII, matched in full: | ( ) (?: ) . [ ] [^ ] \\d \\w \\s \\D \\W \\S
    * + ? {m,n}, ^ at the start and $ at the end. Refused: back-references, look-around, \\b, flags.
JSON schemas: type (or a list of types), properties, required, additionalProperties, items, prefixItems, minItems,
    maxItems, enum, const, anyOf, oneOf (branches that exclude each other), allOf (one branch), $ref (within the
    schema), pattern, minLength, maxLength, minimum, maximum, exclusiveMinimum, exclusiveMaximum, multipleOf. A pattern
    may match anywhere in the string, and its \\s and . are those of ECMA-262. Annotations (title, description, default,
    examples, format, ...) are ignored. Every other keyword is refused by name.
What a model writes is narrower than what the schema allows: objects have their properties in the order of the schema
and no others, numbers at most 15 digits, and any JSON (the schema `true` or `{}`) nests at most DEPTH levels.

Read    Nodes, then Expression.sequence and Schema.compile; the methods named a_... are the types of JSON
"""
import json
import re
import re._parser as parser                                        # private, but exactly the syntax of re
import warnings
from collections import defaultdict, deque
from fractions import Fraction
from itertools import groupby
from math import ceil, floor, gcd, isfinite
from os.path import commonprefix
from reprlib import Repr
from urllib.parse import unquote

LAST = 0x10FFFF                                                    # the highest code point
ANY = [(0, LAST)]
DIGIT, SPACE = [(48, 57)], [(9, 13), (32, 32)]
WORD_CHAR = [(48, 57), (65, 90), (95, 95), (97, 122)]
ECMA_SPACE = [*SPACE, (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F),
              (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)]
NEVER = float("inf")                                               # length of a text that does not exist
LONGEST_TEXT = 2 ** 31                                             # bytes; a longer minimum counts as impossible
DEPTH = 16                                                         # levels of nesting in JSON of any kind
MAX_NODES = 1_000_000                                              # of a schema or expression
BRIEF = Repr()
BRIEF.maxstring = BRIEF.maxother = 200
brief = BRIEF.repr                                                 # repr for messages: long values are shortened


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

    kinds: ("bytes", mask) one byte of a set, bit b of mask; ("seq", ...); ("alt", ...), and alt() matches nothing;
    ("repeat", node, low, high), high None: unlimited; ("ref", name), the node target[name], known later.
    shortest[node]: fewest bytes that match it. usable: the bytes that may be written, as a mask.
    """
    def __init__(self, usable=(1 << 256) - 1):
        self.usable, self.lacking = usable, 0                      # lacking: other bytes that the text could have had
        self.number, self.kind, self.shortest, self.target, self.known = {}, [], [], {}, {}

    def node(self, *kind):
        if kind[0] == "bytes":
            self.lacking |= kind[1] & ~self.usable
            kind = ("bytes", kind[1] & self.usable) if kind[1] & self.usable else ("alt",)
        if kind not in self.number:
            if len(self.kind) == MAX_NODES:
                raise ValueError(f"this schema or expression is too large: it needs more than {MAX_NODES:,} nodes")
            self.number[kind] = len(self.kind)
            self.kind.append(kind)
            self.shortest.append(self.length(kind))
        return self.number[kind]

    def parts(self, kind):
        return {"bytes": (), "repeat": kind[1:2], "ref": (self.target.get(kind[-1]),)}.get(kind[0], kind[1:])

    def length(self, kind):
        """The fewest bytes, from the lengths of the parts; a reference without a target yet is NEVER."""
        lengths = [NEVER if part is None else self.shortest[part] for part in self.parts(kind)]
        if kind[0] == "repeat":
            length = kind[2] and kind[2] * lengths[0]
        else:
            length = {"bytes": 1, "seq": sum(lengths)}.get(kind[0], min(lengths, default=NEVER))
        return length if length < LONGEST_TEXT else NEVER

    def settle(self):
        """All references have targets now: update their lengths, and those of all nodes that contain them."""
        users = defaultdict(list)
        for node, kind in enumerate(self.kind):
            for part in self.parts(kind):
                users[part].append(node)
        todo = deque(node for node, kind in enumerate(self.kind) if kind[0] == "ref")
        waiting = set(todo)
        while todo:
            node = todo.popleft()
            waiting.remove(node)
            length = self.length(self.kind[node])
            if length < self.shortest[node]:
                self.shortest[node] = length
                todo.extend(user for user in users[node] if user not in waiting)
                waiting.update(users[node])

    def byte_range(self, low, high):
        return self.node("bytes", (1 << high + 1) - (1 << low))

    def seq(self, *parts):
        parts = [part for part in parts if self.kind[part] != ("seq",)]
        return parts[0] if len(parts) == 1 else self.node("seq", *parts)

    def alt(self, *parts):
        parts = [part for part in dict.fromkeys(parts) if self.kind[part] != ("alt",)]
        return parts[0] if len(parts) == 1 else self.node("alt", *parts)

    def repeat(self, part, low=0, high=None):
        if high is not None and high < low:
            return self.alt()
        if self.shortest[part] == 0:                               # (a?){5000} matches "a" in 5000 ways, a{0,5000} once
            part, low = self.nonempty(part), 0
        return self.seq() if high == 0 else self.node("repeat", part, low, high)

    def nonempty(self, node):
        """What `node` matches, the empty text excepted."""
        kind, *parts = self.kind[node]
        if self.shortest[node]:
            return node
        if kind == "repeat":                                       # its part is never empty, see above
            return self.repeat(parts[0], 1, parts[2])
        if kind == "alt":
            return self.alt(*map(self.nonempty, parts))
        found, rest = self.alt(), self.seq()
        for part in reversed(parts):                               # the first part that is not empty, then the rest
            found = self.alt(self.seq(self.nonempty(part), rest), found)
            rest = self.seq(part, rest)
        return found

    def maybe(self, part):
        return self.repeat(part, 0, 1)

    def text(self, text):
        return self.seq(*(self.byte_range(b, b) for b in (text if isinstance(text, bytes) else text.encode("utf-8"))))

    def any_of(self, texts):
        """One of these bytes objects, as a tree: equal beginnings exist once, so that long lists are fast."""
        texts = sorted(set(texts))

        def tree(a, b, at):
            """The texts number a to b - 1, which are equal before position `at`."""
            if b - a < 2:
                return self.alt(*(self.text(text[at:]) for text in texts[a:b]))
            end = len(commonprefix([texts[a], texts[b - 1]]))
            masks, short = defaultdict(int), len(texts[a]) == end  # masks: what follows -> the bytes it follows
            for first, group in groupby(range(a + short, b), key=lambda i: texts[i][end]):
                group = list(group)
                masks[tree(group[0], group[-1] + 1, end + 1)] |= 1 << first
            parts = [self.seq(self.node("bytes", mask), rest) for rest, mask in masks.items()]
            return self.seq(self.text(texts[a][at:end]), self.alt(*[self.seq()] * short, *parts))

        return tree(0, len(texts), 0)

    def chars(self, ranges):
        """One character of these ranges of code points, as UTF-8. Surrogates are not characters."""
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
        """UTF-8 sequences of equal length from low to high: first bytes with equal continuations share them."""
        if (low, high) not in self.known:
            follow = defaultdict(int)                              # what follows -> the bytes it follows
            for first in range(low[0], high[0] + 1) if low else ():
                follow[self.between(low[1:] if first == low[0] else b"\x80" * len(low[1:]),
                                    high[1:] if first == high[0] else b"\xbf" * len(low[1:]))] |= 1 << first
            parts = [self.seq(self.node("bytes", mask), rest) for rest, mask in follow.items()]
            self.known[low, high] = self.alt(*parts) if low else self.seq()
        return self.known[low, high]

    def quoted(self, ranges):
        """One character inside a JSON string: control characters, quotes and backslashes need a backslash."""
        special = [i for i in (*range(32), ord('"'), ord("\\")) if any(low <= i <= high for low, high in ranges)]
        plain = without(ranges, [(0, 31), (34, 34), (92, 92)])
        return self.alt(self.chars(plain), self.any_of(json.dumps(chr(i))[1:-1].encode() for i in special))


# ---------------------------------------------------------------------------------------------------------------------
# Regular expressions

STARTS, ENDS = ("AT_BEGINNING", "AT_BEGINNING_STRING"), ("AT_END", "AT_END_STRING")      # ^ \A and $ \Z


class Expression:
    """A regular expression, parsed by re -> nodes. With `inside`, the node of one character inside a JSON string, it is
    the pattern of a schema: it may match anywhere in the string, unless ^ and $ say otherwise."""
    refused = {"AT": r"^, $ or \b in this place", "ASSERT": "look-around", "ASSERT_NOT": "look-around",
               "GROUPREF": "a back-reference", "GROUPREF_EXISTS": "a conditional group",
               "POSSESSIVE_REPEAT": "a possessive quantifier", "ATOMIC_GROUP": "an atomic group"}

    def __init__(self, nodes, pattern, inside=None):
        if not isinstance(pattern, str):
            raise ValueError(f"regular expression {brief(pattern)}: must be a string")
        self.nodes, self.pattern = nodes, pattern
        schema = inside is not None
        self.one = nodes.quoted if schema else nodes.chars
        self.around = nodes.repeat(inside) if schema else nodes.seq()
        self.dot = complement([(10, 10), *[(13, 13), (0x2028, 0x2029)] * schema])
        space = ECMA_SPACE if schema else SPACE
        self.classes = {"DIGIT": DIGIT, "WORD": WORD_CHAR, "SPACE": space, "NOT_DIGIT": complement(DIGIT),
                        "NOT_WORD": complement(WORD_CHAR), "NOT_SPACE": complement(space)}
        try:
            with warnings.catch_warnings():                        # re warns that [[a] may change its meaning
                warnings.simplefilter("ignore", FutureWarning)
                self.tree = parser.parse(pattern, re.ASCII)
        except (re.error, OverflowError) as error:
            raise ValueError(f"regular expression {brief(pattern)}: {error}") from None
        if self.tree.state.flags & ~(re.ASCII | re.UNICODE):
            self.refuse("a flag")

    def refuse(self, what):
        raise ValueError(f"regular expression {brief(self.pattern)}: {what} is not supported. Supported: | ( ) (?: ) . "
                         r"[ ] \d \w \s * + ? {m,n}, ^ at the start, $ at the end")

    def parse(self):
        return self.sequence(self.tree, True, True)

    def anchor(self, items, names):
        return bool(items) and items[0][0] is parser.AT and items[0][1].name in names

    def sequence(self, items, first, last):
        """first, last: is this the start, the end of the expression? ^ and $ may stand only there. Where they do not, a
        schema allows any characters before and after the match."""
        nodes, items = [], list(items)
        starts = first and self.anchor(items[:1], STARTS)
        items = items[starts:]
        ends = last and self.anchor(items[-1:], ENDS)
        items = items[:len(items) - ends]
        before, after = first and not starts, last and not ends
        for i, (op, value) in enumerate(items):
            first, last = before and i == 0, after and i == len(items) - 1
            if op in (parser.SUBPATTERN, parser.BRANCH):           # each branch may have its own ^ and $
                nodes.append(self.item(op, value, first, last))
            else:
                nodes += [*[self.around] * first, self.item(op, value), *[self.around] * last]
        return self.nodes.seq(*nodes) if items else self.around if before or after else self.nodes.seq()

    def item(self, op, value, first=False, last=False):
        match op.name:
            case "LITERAL":
                return self.one([(value, value)])
            case "NOT_LITERAL":
                return self.one(complement([(value, value)]))
            case "ANY":
                return self.one(self.dot)
            case "IN":
                return self.one(self.bracket(value))
            case "BRANCH":
                return self.nodes.alt(*(self.sequence(branch, first, last) for branch in value[1]))
            case "SUBPATTERN" if not value[1] and not value[2]:
                return self.sequence(value[3], first, last)
            case "MAX_REPEAT" | "MIN_REPEAT":                      # lazy or greedy: the same texts match
                low, high, part = value
                part, unlimited = self.sequence(part, False, False), high is parser.MAXREPEAT
                return self.nodes.repeat(part, low, None if unlimited else high)
        self.refuse(self.refused.get(op.name, op.name.lower()))

    def bracket(self, items):
        negated, ranges = items[0][0] is parser.NEGATE, []
        for op, value in items[negated:]:
            ranges += self.classes[value.name.removeprefix("CATEGORY_")] if op is parser.CATEGORY else \
                [value if op is parser.RANGE else (value, value)]
        return complement(ranges) if negated else union(ranges)

    def of_length(self, low, high):
        """The matches of `low` to `high` characters (high None: unlimited), or None where that is not simple: we adjust
        the count of one repeat, so all other parts must have a fixed length."""
        first, items, last = self.tree[:1], list(self.tree)[1:-1], self.tree[-1:]
        if not self.anchor(first, STARTS) or not self.anchor(last, ENDS):
            return None
        while len(items) == 1 and items[0][0] is parser.SUBPATTERN and not any(items[0][1][1:3]):
            items = list(items[0][1][3])
        widths = [parser.SubPattern(self.tree.state, [item]).getwidth() for item in items]
        least, most = sum(few for few, _ in widths), sum(many for _, many in widths)
        if low <= least and (high is None or most <= high):
            return self.parse()
        loose = [i for i, (few, many) in enumerate(widths) if few != many]
        if len(loose) != 1 or items[loose[0]][0] not in (parser.MAX_REPEAT, parser.MIN_REPEAT):
            return None
        op, (few, many, part) = items[loose[0]]
        width, widest = part.getwidth()
        if width != widest or not width:
            return None
        rest = least - widths[loose[0]][0]
        few, many = max(few, ceil((low - rest) / width)), min(many, many if high is None else (high - rest) // width)
        items[loose[0]] = op, (few, many, part)
        return self.sequence([*first, *items, *last], True, True) if few <= many else self.nodes.alt()


# ---------------------------------------------------------------------------------------------------------------------
# JSON and JSON schemas

ANNOTATIONS = {"title", "description", "default", "examples", "format", "deprecated", "readOnly", "writeOnly",
               "$schema", "$id", "$anchor", "$comment", "$defs", "definitions", "contentEncoding", "contentMediaType",
               "contentSchema"}
WITHOUT_EFFECT = {"uniqueItems": False, "minProperties": 0, "patternProperties": {}, "dependentRequired": {},
                  "dependentSchemas": {}, "propertyNames": True, "not": False, "unevaluatedProperties": True,
                  "unevaluatedItems": True}
LIMITS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
KEYWORDS = {"string": {"pattern", "minLength", "maxLength"}, "integer": LIMITS, "number": LIMITS, "boolean": set(),
            "null": set(), "array": {"items", "prefixItems", "minItems", "maxItems"},
            "object": {"properties", "required", "additionalProperties"}}
ALWAYS = {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"}
MAX_REMAINDERS = 5000                                              # for multipleOf: 300 is possible, and 3600
MAX_COUNT = 10 ** 9


def same(a, b):
    """Equal in JSON, where 1 is 1.0 but not true."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def is_a(kind, value):
    """Is the value of this type of JSON schema, where 1.0 is an integer?"""
    if isinstance(value, bool):
        return kind == "boolean"
    python = {"string": str, "integer": int, "number": (int, float), "null": type(None), "array": list, "object": dict}
    whole = isinstance(value, float) and value.is_integer()
    return isinstance(value, python.get(kind, ())) or kind == "integer" and whole


class Schema:
    """A JSON schema -> nodes. Each $ref becomes a reference node, so the grammar is as finite as the schema."""
    def __init__(self, nodes, schema):
        self.nodes, self.root, self.known, self.todo, self.comparisons = nodes, schema, {}, [], 0
        n = nodes
        # one blank, or a new line with its indentation: enough for pretty JSON; endless white space is impossible
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
        escape = n.seq(n.text("\\"), n.alt(n.any_of([bytes([b]) for b in b'"\\/bfnrt']), n.seq(n.text("u"), unit)))
        self.character = n.alt(n.chars(without(ANY, [(0, 31), (34, 34), (92, 92)])), escape)
        self.string = self.string_of(n.repeat(self.character))
        self.comma = n.seq(n.text(","), self.blank)

    def parse(self):
        root = self.compile(self.root)
        while self.todo:
            pointer = self.todo.pop()
            self.nodes.target[pointer] = self.compile(self.find(pointer, pointer), pointer)
        self.nodes.settle()
        return root

    def fail(self, where, what):
        raise ValueError(f"JSON schema at {where or 'the top'}: {what}")

    def checked(self, schema, where):
        """The schema without keywords that have no effect."""
        if not isinstance(schema, (dict, bool)):
            self.fail(where, f"{brief(schema)} is not a schema; allowed are an object, true and false")
        return schema if isinstance(schema, bool) else {
            key: value for key, value in schema.items() if key not in ANNOTATIONS
            and not (key in WITHOUT_EFFECT and same(value, WITHOUT_EFFECT[key]))}

    def compile(self, schema, where=""):
        """The node of what `schema` allows. `where` names it in messages."""
        n, schema = self.nodes, self.checked(schema, where)
        if not isinstance(schema, dict) or not schema:
            return n.alt() if schema is False else self.anything(DEPTH)
        if "$ref" in schema:
            self.expect(schema, {"$ref"}, where)
            pointer = schema["$ref"]
            self.find(pointer, where)
            if ("ref", pointer) not in n.number:
                self.todo.append(pointer)
            return n.node("ref", pointer)
        if "const" in schema or "enum" in schema:
            self.expect(schema, {"const", "enum", "type"}, where)
            return self.literals(schema, where)
        for key in ("anyOf", "oneOf", "allOf"):
            if key in schema:
                self.expect(schema, {key}, where)
                parts = self.of_type(schema, key, list, where)
                self.check_branches(key, parts, where)
                return n.alt(*(self.compile(part, f"{where}/{key}/{i}") for i, part in enumerate(parts)))
        types = self.types(schema, where)
        if "type" not in schema:                                   # then the other keywords tell which type is meant
            types = [kind for kind in types if KEYWORDS[kind] & schema.keys()] or types
        self.expect(schema, ALWAYS.union(*(KEYWORDS[kind] for kind in types)), where)
        return n.alt(*(getattr(self, f"a_{kind}")(schema, where) for kind in types))

    def types(self, schema, where):
        types = schema.get("type", list(KEYWORDS))
        types = types if isinstance(types, list) else [types]
        for kind in types:
            if not isinstance(kind, str) or kind not in KEYWORDS:
                self.fail(where, f"type {brief(kind)}; choose among {', '.join(KEYWORDS)}")
        return types

    def expect(self, schema, allowed, where):
        odd = sorted(schema.keys() - allowed, key=str)
        if odd:
            supported = ", ".join(sorted(allowed))
            self.fail(where, f"the keyword {brief(odd[0])} is not supported here. Supported: {supported}")

    def of_type(self, schema, key, kind, where, default=None):
        value = schema.get(key, default)
        if kind is int and is_a("integer", value) and 0 <= value <= MAX_COUNT:
            return int(value)
        if not isinstance(value, kind) or kind is int:
            must = f"a whole number from 0 to {MAX_COUNT}" if kind is int else f"of type {kind.__name__}"
            self.fail(where, f"{key}={brief(value)} must be {must}")
        return value

    def find(self, pointer, where):
        """What a $ref points to."""
        if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
            self.fail(where, f"$ref={brief(pointer)}: only references within the schema, #/...")
        target = self.root
        for part in unquote(pointer).split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, dict) and part in target:
                target = target[part]
            elif isinstance(target, list) and part in map(str, range(len(target))):
                target = target[int(part)]
            else:
                self.fail(where, f"$ref={brief(pointer)}: nothing stands there")
        return target

    # -- which branch a value belongs to

    def check_branches(self, key, parts, where):
        if key == "allOf" and len(parts) != 1:
            self.fail(where, f"allOf with {len(parts)} schemas is not supported, only with one: write one schema")
        if key == "oneOf":
            if not parts:
                self.fail(where, "oneOf=[] must hold at least one schema")
            for j, b in enumerate(parts):
                for i, a in enumerate(parts[:j]):
                    if not self.disjoint(a, b, where):
                        self.fail(where, "oneOf is supported where its branches exclude each other by type, const, "
                                  f"enum, limits or a required property; branches {i} and {j} may not. Use anyOf")

    def disjoint(self, a, b, where, level=0):
        """Can no value satisfy both schemas? False where this is not evident."""
        self.compared(1, where)
        a, b = self.checked(a, where), self.checked(b, where)
        if a is False or b is False:
            return True
        if a is True or b is True or level > 8:
            return False
        again = lambda x, y: self.disjoint(x, y, where, level + 1)
        for x, y in ((a, b), (b, a)):
            if "$ref" in x:
                return again(self.find(x["$ref"], where), y)
            for key in {"anyOf", "oneOf", "allOf"} & x.keys():     # allOf has one branch
                return all(again(part, y) for part in self.of_type(x, key, list, where))
        for x, y in ((a, b), (b, a)):
            if "const" in x or "enum" in x:
                return not self.overlap(self.values(x, where), y, where)
        kinds = [{"number" if kind == "integer" else kind for kind in self.types(x, where)} for x in (a, b)]
        common = kinds[0] & kinds[1]
        if common == {"number"}:
            (low, high), (other_low, other_high) = (self.interval(x, where, 10 ** 15) for x in (a, b))
            return high < other_low or other_high < low
        if common != {"object"}:
            return not common
        properties = [self.of_type(x, "properties", dict, where, {}) for x in (a, b)]
        required = [name for x in (a, b) for name in self.of_type(x, "required", list, where, [])]
        required = [name for name in required if isinstance(name, str)]
        others = [x.get("additionalProperties", True) for x in (a, b)]
        return any(again(*(known.get(name, other) for known, other in zip(properties, others))) for name in required)

    def compared(self, count, where):
        self.comparisons += count
        if self.comparisons > 300_000:
            self.fail(where, "oneOf has too many branches or values to compare. Use anyOf")

    def overlap(self, values, schema, where):
        """Could one of the values satisfy the schema? Yes where only its type is known."""
        if "const" in schema or "enum" in schema:
            others = self.values(schema, where)
            self.compared(len(values) * len(others), where)
            return any(same(value, other) for value in values for other in others)
        return any(is_a(kind, value) for value in values for kind in self.types(schema, where))

    # -- values of each type

    def values(self, schema, where):
        """The values that const and enum allow, of the types that `type` allows."""
        values = [schema["const"]] if "const" in schema else self.of_type(schema, "enum", list, where)
        if "const" in schema and "enum" in schema:
            others = self.of_type(schema, "enum", list, where)
            values = [value for value in values if any(same(value, other) for other in others)]
        kinds = self.types(schema, where)
        return [value for value in values if any(is_a(kind, value) for kind in kinds)]

    def literals(self, schema, where):
        values = self.values(schema, where)
        try:
            texts = [json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8") for value in values]
            return self.nodes.any_of(texts)
        except ValueError as error:
            self.fail(where, f"{brief(values)} is not JSON ({error})")

    def anything(self, depth):
        """Any JSON value, `depth` levels deep at most: a model may not open brackets until its tokens run out."""
        if ("any", depth) not in self.known:
            n = self.nodes
            parts = [self.string, self.number, n.text("true"), n.text("false"), n.text("null")]
            if depth > 0:
                inner = self.anything(depth - 1)
                parts += [self.list_of([], inner, 0, None), self.map_of(inner)]
            self.known["any", depth] = n.alt(*parts)
        return self.known["any", depth]

    def string_of(self, characters):
        return self.nodes.seq(self.nodes.text('"'), characters, self.nodes.text('"'))

    def a_string(self, schema, where):
        low = self.of_type(schema, "minLength", int, where, 0)
        high = self.of_type(schema, "maxLength", int, where) if "maxLength" in schema else None
        if "pattern" not in schema:
            return self.string_of(self.nodes.repeat(self.character, low, high))
        pattern = Expression(self.nodes, self.of_type(schema, "pattern", str, where), inside=self.character)
        node = pattern.of_length(low, high) if low or high is not None else pattern.parse()
        if node is None:
            self.fail(where, "pattern together with minLength or maxLength is supported for ^...$ with one part of "
                      "variable length, like ^[A-Z][a-z]*$; put {m,n} into the pattern")
        return self.string_of(node)

    def limit(self, schema, key, where):
        """The number as it is written in the schema, so 0.1 is 1/10; None if the keyword is missing."""
        value = schema.get(key)
        if key in schema and (isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value)):
            self.fail(where, f"{key}={brief(value)} must be a number")
        return None if value is None else Fraction(repr(value))

    def interval(self, schema, where, scale=1):
        """The least and the greatest integer i so that i / scale is within the limits, which are 10^15 if missing."""
        low, high = -10 ** 15 * scale, 10 ** 15 * scale
        if "minimum" in schema:
            low = max(low, ceil(scale * self.limit(schema, "minimum", where)))
        if "exclusiveMinimum" in schema:
            low = max(low, floor(scale * self.limit(schema, "exclusiveMinimum", where)) + 1)
        if "maximum" in schema:
            high = min(high, floor(scale * self.limit(schema, "maximum", where)))
        if "exclusiveMaximum" in schema:
            high = min(high, ceil(scale * self.limit(schema, "exclusiveMaximum", where)) - 1)
        return low, high

    def a_integer(self, schema, where):
        return self.a_number(schema, where, places=0)

    def a_number(self, schema, where, places=15):
        """Numbers within limits have no exponent, at most 15 digits and at most `places` of them after the point."""
        if not LIMITS & schema.keys():
            return self.number if places else self.integer
        n, parts, step = self.nodes, [], self.limit(schema, "multipleOf", where)
        if step is not None and step <= 0:
            self.fail(where, f"multipleOf={schema['multipleOf']} must be above 0")
        if step:                                                   # its multiples need no more places than itself
            places = min(places, next((q for q in range(16) if 10 ** q % step.denominator == 0), 16))
        for whole in range(1, 16):                                 # digits before the point
            after = min(places, 15 - whole)
            scale = 10 ** after
            modulus = step.numerator * scale // gcd(scale, step.denominator) if step else 1
            if sum(modulus // gcd(10 ** i, modulus) for i in range(1, 16)) > MAX_REMAINDERS:
                self.fail(where, f"multipleOf={brief(schema['multipleOf'])} is too large: it needs a state for each "
                          f"remainder of each length, {MAX_REMAINDERS} at most")
            low, high = self.interval(schema, where, scale)
            smallest, greatest = 10 ** (whole - 1 + after) if whole > 1 else 0, 10 ** (whole + after) - 1
            for sign, a, b in (("", max(low, smallest), min(high, greatest)),
                               ("-", max(-high, smallest, 1), min(-low, greatest))):
                if a <= b:
                    low_text, high_text = str(a).zfill(whole + after), str(b).zfill(whole + after)
                    parts.append(n.seq(n.text(sign), self.digits(low_text, high_text, whole, modulus)))
        return n.alt(*parts)

    def digits(self, low, high, whole, modulus, remainder=0):
        """Strings of digits from `low` to `high`, all equally long, that give a multiple of `modulus` together with the
        `remainder` of the digits before them. A point follows the first `whole`; zeros at its end are optional.
        """
        key = low, high, whole, modulus, remainder
        if not low:
            return self.nodes.alt() if remainder else self.nodes.seq()
        if key not in self.known:
            n, follow = self.nodes, defaultdict(list)
            for digit in range(int(low[0]), int(high[0]) + 1):
                rest = self.digits(low[1:] if digit == int(low[0]) else "0" * len(low[1:]),
                                   high[1:] if digit == int(high[0]) else "9" * len(low[1:]),
                                   max(whole - 1, -1), modulus, (remainder + digit * 10 ** len(low[1:])) % modulus)
                follow[rest].append((48 + digit, 48 + digit))
            node = n.alt(*(n.seq(n.chars(ranges), rest) for rest, ranges in follow.items() if n.shortest[rest] < NEVER))
            node = n.seq(n.text("."), node) if whole == 0 else node
            if whole <= 0 and int(low) == 0 and remainder == 0:
                node = n.maybe(node)
            self.known[key] = node
        return self.known[key]

    def a_boolean(self, schema, where):
        return self.nodes.alt(self.nodes.text("true"), self.nodes.text("false"))

    def a_null(self, schema, where):
        return self.nodes.text("null")

    def list_of(self, first, item, low, high):
        """[a, b, c, ...]: the nodes `first` in turn, then any number of `item`; `low` to `high` values in all."""
        n = self.nodes
        if high is not None and high < low:
            return n.alt()
        count = len(first) if high is None else min(len(first), high)
        if count == high:
            rest = n.seq()
        elif count:
            rest = n.repeat(n.seq(self.comma, item), max(0, low - count), high and high - count)
        else:
            some = n.seq(item, n.repeat(n.seq(self.comma, item), max(0, low - 1), high and high - 1))
            rest = some if low else n.maybe(some)
        for i in reversed(range(count)):                           # rest: what may follow i + 1 values, then i values
            rest = n.seq(*[self.comma] * (i > 0), first[i], rest)
            rest = n.maybe(rest) if i >= low else rest
        return n.seq(n.text("["), self.blank, rest, self.blank, n.text("]"))

    def map_of(self, value):
        n = self.nodes
        pair = n.seq(self.string, n.text(":"), self.blank, value)
        pairs = n.seq(pair, n.repeat(n.seq(self.comma, pair)))
        return n.seq(n.text("{"), self.blank, n.maybe(pairs), self.blank, n.text("}"))

    def a_array(self, schema, where):
        low = self.of_type(schema, "minItems", int, where, 0)
        high = self.of_type(schema, "maxItems", int, where) if "maxItems" in schema else None
        first = [self.compile(part, f"{where}/prefixItems/{i}")
                 for i, part in enumerate(self.of_type(schema, "prefixItems", list, where, []))]
        return self.list_of(first, self.inner(schema, "items", where), low, high)

    def inner(self, schema, key, where):
        """The node of a subschema that may be missing. Then it allows any JSON, one level less deep."""
        return self.compile(schema[key], f"{where}/{key}") if key in schema else self.anything(DEPTH - 1)

    def a_object(self, schema, where):
        n = self.nodes
        properties = self.of_type(schema, "properties", dict, where, {})
        required = self.of_type(schema, "required", list, where, [])
        if not all(isinstance(name, str) for name in required):
            self.fail(where, f"required={brief(required)} must hold strings only")
        if not properties and not required:
            return self.map_of(self.inner(schema, "additionalProperties", where))
        other = schema.get("additionalProperties", True)
        properties = properties | {name: other for name in required if name not in properties}
        required = set(required)
        pairs, later, may_end = n.alt(), n.seq(), True             # the pairs from here on; the same after a comma
        for name, value in reversed(properties.items()):
            key = n.seq(n.text(json.dumps(name, ensure_ascii=False)), n.text(":"), self.blank)
            pair = n.seq(key, self.compile(value, f"{where}/properties/{name}"), later)
            pairs, may_end = (pair, False) if name in required else (n.alt(pair, pairs), may_end)
            later = n.seq(self.comma, pairs)
            later = n.maybe(later) if may_end else later
        pairs = n.maybe(pairs) if may_end else pairs
        return n.seq(n.text("{"), self.blank, pairs, self.blank, n.text("}"))
