"""constrain.py against Python's re, json and jsonschema, and its masks against one token at a time."""
import json
import math
import random
import re
import time
import warnings
from fractions import Fraction

import pytest


from bpe import Tokenizer
from conftest import DATA
from nanopath.constrain import Constraint

BYTES = Tokenizer.train([], 264)
MERGED = Tokenizer.train(['{"name": "a", "b": [1, 22, 333], "ccc": true}\n' * 20 + "ab abc été 😀😀 xyz" * 30], 290)


def accepts(constraint, text):
    state = constraint.start
    for b in text.encode("utf-8"):
        state = constraint.step(state, b)                          # in BYTES the id of a byte is the byte
        if state < 0:
            return False
    return constraint.ends(state)


def write(constraint, rng, left, tokenizer, stop=0.2):
    """A random text, by the masks alone."""
    state, ids = constraint.start, []
    while True:
        allowed = constraint.allowed(state, left - len(ids)).tolist()
        if constraint.ends(state) and (not allowed or rng.random() < stop):
            break
        assert allowed, "neither an end nor a way on"
        ids.append(rng.choice(allowed))
        state = constraint.step(state, ids[-1])
    assert len(ids) <= left and constraint.ends(state)
    return tokenizer.decode_bytes(ids).decode("utf-8")


def random_expression(rng, depth=3):
    kind = rng.randrange(8 if depth else 3)
    inner = lambda: random_expression(rng, depth - 1)
    if kind == 0:
        return rng.choice(["a", "b", "é", "😀", r"\.", ".", r"\n", r"\x41", r"\u00e9"])
    if kind == 1:
        return rng.choice([r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", "[a-c]", "[^ab]", r"[é-ü\d]", r"[\w-]", "[]a]", r"[^\s😀]"])
    if kind == 2:
        return rng.choice(["ab", "", "1"])
    if kind == 3:
        return f"(?:{inner()}|{inner()})"
    if kind == 4:
        return f"({inner()}){rng.choice(['*', '+', '?', '{2}', '{1,3}', '{,2}', '{2,}', '*?'])}"
    return inner() + inner()


def test_expressions_accept_what_re_accepts():
    rng, yes = random.Random(0), 0
    alphabet = "ab1éü😀 .-\nA\u2028]"
    for _ in range(300):
        pattern = random_expression(rng)
        constraint, known = Constraint(pattern, BYTES), re.compile(pattern, re.ASCII)
        texts = ["".join(rng.choices(alphabet, k=rng.randrange(5))) for _ in range(25)]
        texts += [write(constraint, rng, 12, BYTES) for _ in range(3) if constraint.shortest <= 12]
        for text in texts:
            found = bool(known.fullmatch(text))
            assert accepts(constraint, text) == found, (pattern, text)
            yes += found
    assert yes > 500


def test_every_character_class_is_that_of_re():
    for pattern in (".", r"\W", r"[^\d]", "[\u0800-\uffff]", "[\u07ff-\U00010001]", "[à-ÿ]", r"[\U0001f600-\U0010ffff]"):
        constraint, known = Constraint(pattern, BYTES), re.compile(pattern, re.ASCII)
        for code in [*range(0, 0x900), *range(0xD700, 0xD800), *range(0xE000, 0xE010), *range(0xFF00, 0x10100),
                     *range(0x1F5F0, 0x1F700), 0x10FFFF]:
            assert accepts(constraint, chr(code)) == bool(known.fullmatch(chr(code))), (pattern, hex(code))


@pytest.mark.parametrize("tokenizer", [BYTES, MERGED])
def test_json_is_json_however_little_room(tokenizer):
    constraint, rng, kinds = Constraint("json", tokenizer), random.Random(1), set()
    for left in [1, 2, 3, 5, 10, 30, 100] * 12:
        kinds.add(type(json.loads(write(constraint, rng, left, tokenizer, stop=0.05))))
    assert {dict, list, str, float} <= kinds


def test_json_accepts_what_others_write():
    constraint, rng = Constraint("json", BYTES), random.Random(2)

    def value(depth):
        kind = rng.randrange(8 if depth else 5)
        return {0: None, 1: rng.random() < 0.5, 2: rng.randrange(-10 ** 9, 10 ** 9), 3: round(rng.uniform(-9, 9), 6), 4: "".join(
            rng.choices('aé"\\\n\t/\x00\x7f😀', k=3))}.get(kind, [value(depth - 1) for _ in range(rng.randrange(3))] if kind < 7 and depth
                                                            else {rng.choice("ab\"é"): value(depth - 1)} if depth else 0)

    for _ in range(300):
        v = value(4)
        for options in ({}, dict(ensure_ascii=False), dict(separators=(",", ":")), dict(indent=2)):
            text = json.dumps(v, **options)
            assert "\\ud8" in text or accepts(constraint, text), text       # emoji as two halves: never written
    for bad in ("", "01", "1.", "{,}", "[1,]", '{"a"}', '"\n"', "nul", "{'a':1}", '"\\x"', "NaN", "--1", '"\\ud800"', "[[]"):
        assert not accepts(constraint, bad)


SCHEMAS = [
    {"type": "object", "properties": {"a": {"type": "integer", "minimum": -7, "maximum": 1205}, "b c": {"type": ["string", "null"]},
                                      "é\"": {"enum": [1, "x", None, [1, 2], {"k": 0.5}]}}, "required": ["b c"], "additionalProperties": False},
    {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 3}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"const": "é"}], "items": {"type": "boolean"}, "minItems": 1, "maxItems": 5},
    {"type": "array", "prefixItems": [{"type": "null"}], "items": False},
    {"$defs": {"node": {"type": "object", "properties": {"v": {"type": "number"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                        "required": ["v", "next"]}}, "$ref": "#/$defs/node"},
    {"type": "object", "additionalProperties": {"type": "array", "items": {"$ref": "#"}}},
    {"type": "string", "pattern": "^[A-Z]{2}-\\d{3}[\"\\\\é]?$", "description": "a remark"},
    {"minimum": 3, "maximum": 3}, {"type": "integer", "minimum": 95, "maximum": 10107}, {"type": "integer", "maximum": -5},
    {"type": "number", "minimum": -1.25, "exclusiveMaximum": 3}, {"type": "number", "exclusiveMinimum": 0.1, "maximum": 0.30000000000000004},
    {"type": "number", "exclusiveMinimum": -1e-3, "maximum": 1e300}, {"type": "integer", "minimum": 0.0, "exclusiveMaximum": 50, "multipleOf": 7},
    {"type": "integer", "multipleOf": 3600}, {"type": "number", "multipleOf": 0.25, "minimum": -2}, {"type": "integer", "minimum": 0.5, "maximum": 3.5},
    {"type": ["number", "null"], "exclusiveMinimum": 999999999}, {"type": ["number", "integer"], "minimum": 1}, {"type": "number", "maximum": 1},
    {"type": "string", "pattern": "b.\\s", "uniqueItems": False}, {"type": "string", "pattern": "^a|b$"}, {"type": "string", "pattern": "(^a$)|x(b|$)"},
    {"type": "string", "pattern": "^[A-Z][a-z]*-[0-9]{2}$", "minLength": 6, "maxLength": 9}, {"type": "string", "pattern": "^(a|b)$", "maxLength": 1},
    {"type": "string", "pattern": "^((?:ab)+)$", "minLength": 3, "maxLength": 7.0}, {"type": "string", "pattern": "^$|^[^\\d]{2}$", "format": "x"},
    {"allOf": [{"$ref": "#/$defs/a%20b"}], "description": "x", "$defs": {"a b": {"type": "integer", "maximum": 3}}},
    {"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 2}, {"const": [1]}, {"enum": [None, False]}, {"type": "array", "items": False}][:4]},
    {"oneOf": [{"type": "object", "properties": {"kind": {"const": kind}, "v": {"type": ["number", "string"]}}, "required": ["kind"]} for kind in "abc"]},
    {"oneOf": [{"type": "object", "required": ["x"]}, {"type": "object", "properties": {"y": {}}, "additionalProperties": False},
               {"type": "number", "maximum": 1}, {"type": "integer", "exclusiveMinimum": 1}, {"$ref": "#/$defs/text"}], "$defs": {"text": {"type": "string"}}},
    {"type": "object", "required": ["x"]}, {"type": "object", "properties": {"p": {}, "q": False, "r": {"type": "boolean"}}}, True, {}]


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_what_is_written_satisfies_its_schema(schema):
    jsonschema = pytest.importorskip("jsonschema")
    validator, rng = jsonschema.Draft202012Validator(schema), random.Random(3)
    for tokenizer in (BYTES, MERGED):
        constraint = Constraint(schema, tokenizer)
        for room in [0, 1, 4, 20, 60] * 6:
            text = write(constraint, rng, constraint.shortest + room, tokenizer)
            assert validator.is_valid(json.loads(text)), text


def test_bounds_of_integers_are_exact():
    rng = random.Random(4)
    for _ in range(150):
        low, high = sorted(rng.choice([rng.randrange(-30, 30), rng.randrange(-2000, 2000)]) for _ in range(2))
        constraint = Constraint({"type": "integer", "minimum": low, "maximum": high}, BYTES)
        for i in [low - 1, low, high, high + 1, *rng.choices(range(-2100, 2100), k=30)]:
            assert accepts(constraint, str(i)) == (low <= i <= high), (low, high, i)


@pytest.mark.parametrize("what,message", [
    ("(", "unterminated"), ("a**", "multiple repeat"), (r"(a)\1", "not supported"), ("(?=a)", "not supported"), (r"\bx", "not supported"),
    ("(?i)a", "not supported"), ("a++", "not supported"), ("a^b", "not supported"), ("a$b", "not supported"), (r"[^\x00-\U0010ffff]", "no finite text"),
    ({"type": "text"}, "type 'text'"), ({"type": "string", "uniqueItems": True}, "uniqueItems"), ({"oneOf": []}, "oneOf"),
    ({"type": "array", "minItems": 3, "maxItems": 2}, "no finite text"), ({"enum": []}, "no finite text"), (False, "no finite text"),
    ({"$ref": "#"}, "no finite text"), ({"$ref": "#/nowhere"}, "nothing"), ({"$ref": "http://x"}, "within the schema"),
    ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "no finite text"),
    ({"type": "integer", "minimum": 5, "maximum": 4}, "no finite text"), ({"type": "integer", "minimum": 0.5, "maximum": 0.75}, "no finite text"),
    ({"type": ["number", "integer"], "minimum": "1"}, "minimum='1'"), ({"type": "string", "maximum": 1}, "'maximum'"), ({"type": "number", "maximum": math.nan}, "maximum=nan"),
    ({"type": "number", "minimum": True}, "minimum=True"), ({"type": "integer", "multipleOf": 0}, "above 0"), ({"type": "integer", "multipleOf": 997}, "too large"),
    ({"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 3}]}, "branches 0 and 1"), ({"oneOf": [True, {"type": "null"}]}, "branches 0 and 1"),
    ({"oneOf": [{"properties": {"a": {"const": 1}}}, {"type": "object", "properties": {"a": {"const": 2}}}]}, "branches 0 and 1"),
    ({"oneOf": [{"type": "number", "maximum": 0.6}, {"type": "number", "minimum": 0.3}]}, "branches 0 and 1"),
    ({"oneOf": [{"enum": [1, "x"]}, {"const": 1.0}]}, "branches 0 and 1"), ({"allOf": [{}, {}]}, "allOf with 2"), ({"allOf": [{}], "type": "null"}, "'type'"),
    ({"$ref": "#/%24defs/\u00b2", "$defs": [1]}, "nothing"), ({"type": "array", "minItems": 10 ** 400}, "minItems"), ({"type": "array", "minItems": 1.5}, "minItems"),
    ({"type": "array", "minItems": 10 ** 9, "items": {"type": "array", "minItems": 10 ** 9}}, "no finite text"), ({"x": {}, 5: 1}, "5"),
    ({"type": "string", "pattern": "a^"}, "not supported"), ({"type": "string", "pattern": "^[ab]*[cd]*$", "maxLength": 3}, "pattern together"),
    ([], "not a schema"), ([{"type": "null"}], "not a schema"), (5, "not a schema"), (None, "not a schema"), (1.5, "not a schema"),
    ({"type": "string", "minLength": -1}, "minLength"),
    ({"type": "string", "minLength": 2, "maxLength": 1}, "no finite text"), ({"properties": 5}, "properties"), ({"items": 7}, "not a schema"),
    ({"const": math.nan}, "not JSON"), ({"type": "string", "pattern": "(?=x)"}, "not supported"), ({"anyOf": {}}, "anyOf"),
    ({"type": "string", "pattern": "a", "maxLength": 3}, "pattern together"), ({"required": ["a", 1]}, "required=['a', 1]"),
    ({"type": {}}, "type {}"), ({"type": [["string"]]}, "type ['string']"), ({"type": None}, "type None"), ({"const": 1, "type": [{}]}, "type {}"),
    ({"const": True, "enum": [1]}, "no finite text"), ({"const": 1, "enum": 5}, "enum=5"), ({"const": 1.5, "type": "integer"}, "no finite text")])
def test_what_is_not_supported_or_impossible_is_refused_early_by_name(what, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Constraint(what, BYTES)
    assert "\n" not in str(error.value)


def test_equality_is_that_of_json_and_lists_may_be_long():
    assert accepts(Constraint({"const": [1, {"a": True}], "enum": [[1.0, {"a": True}]]}, BYTES), '[1, {"a": true}]')
    both = Constraint({"enum": [True, 1.0], "type": "integer"}, BYTES)
    assert accepts(both, "1.0") and not accepts(both, "true")
    many = Constraint({"type": "array", "prefixItems": [{"const": i} for i in range(3000)], "items": False, "minItems": 2}, BYTES)
    assert accepts(many, json.dumps(list(range(3000)))) and accepts(many, "[0,1]") and not accepts(many, "[0]")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert accepts(Constraint("[[a]+", BYTES), "[a")


def test_a_vocabulary_that_cannot_spell_it_is_refused():
    class Poor:
        tokens = {b"a": 0, b"bb": 1}
    assert Constraint("a+", Poor).allowed(0, 5).tolist() == [0]
    with pytest.raises(ValueError, match="0x62"):
        Constraint("a+b", Poor)
    with pytest.raises(ValueError, match="ambiguous"):
        write(Constraint("a?" * 25000, BYTES), random.Random(0), 10, BYTES)


@pytest.mark.parametrize("pattern", ["((a?){500}){500}", "(a?){5000}", "(a|aa){0,5000}", "(?:a?b?c?){3000}", "((((a*)*)*)*)*b?", "(a|a?)+", "(|a|b){3,5}",
                                     "(a?){2}b", "(a*b*){2,3}", "((a|b?)c?){0,2}"])
def test_repeats_of_what_may_be_empty_are_quick_and_exact(pattern):
    constraint, known, state = Constraint(pattern, BYTES), re.compile(pattern), 0
    texts = ["", "a", "b", "ab", "ba", "aab", "abab", "ababab", "aaaaaa", "cc", "acbc"]
    if "00" not in pattern:                                        # else re itself takes for ever
        assert all(accepts(constraint, text) == bool(known.fullmatch(text)) for text in texts)
    for i in range(60):
        if 97 in constraint.allowed(state := constraint.start if not i else state, 100):
            state = constraint.step(state, 97)
    assert len(constraint.states[state]) < 130


def test_masks_are_those_of_one_token_at_a_time():
    tokenizer = Tokenizer.load(DATA / "gpt2") if (DATA / "gpt2").is_dir() else MERGED
    for tokens, whats, steps in ((MERGED, ["json", "(a|ab|abc){3,40}x?", {"type": "string", "minLength": 3, "maxLength": 30}, *SCHEMAS], 25),
                                 (tokenizer, [r"( ?[a-z]+)+\.", {"type": "string", "maxLength": 40}], 2)):
        for what in whats:
            constraint, rng = Constraint(what, tokens), random.Random(5)
            state, left = constraint.start, constraint.shortest + rng.choice([0, 3, 40])
            for left in range(left, max(0, left - steps), -1):
                allowed = constraint.allowed(state, left).tolist()
                assert sorted(allowed) == sorted(constraint.allowed_slowly(state, left).tolist())
                if not allowed:
                    break
                state = constraint.step(state, rng.choice(allowed))


def test_a_long_count_needs_no_new_masks_and_masks_are_kept_by_bytes(monkeypatch):
    walked, walk = [], Constraint.walk
    monkeypatch.setattr(Constraint, "walk", lambda self, state, tokens: walked.append(state) or walk(self, state, tokens))
    for schema in ({"type": "string"}, {"type": "string", "maxLength": 1000}, {"type": "string", "pattern": "^[a-z]{0,999}$"}):
        constraint = Constraint(schema, MERGED)
        state, walked[:] = constraint.step(constraint.start, ord('"')), []
        for _ in range(100):
            assert 97 in constraint.allowed(state, 2000)
            state = constraint.step(state, 97)
        assert len(walked) == len(constraint.groups)               # each group of tokens once
    monkeypatch.setattr("nanopath.constrain.MASK_BYTES", 4000)
    constraint, other, rng = Constraint("json", MERGED), Constraint("json", MERGED), random.Random(6)
    for _ in range(10):
        text, state = write(other, rng, 60, MERGED, stop=0), constraint.start
        for i in MERGED.encode(text):
            assert sorted(constraint.allowed(state, 99).tolist()) == sorted(constraint.allowed(state, 99).tolist())
            state = constraint.step(state, i)
            assert constraint.held == sum(ids.nbytes for ids, _, _ in constraint.masks.values()) < 4000 + 4 * len(constraint.ids)


def test_a_token_that_may_not_follow_leads_nowhere():
    constraint = Constraint("[a-e]{2}", MERGED)
    special = MERGED.eos_id
    assert constraint.step(constraint.start, special) == -1 == constraint.step(constraint.start, ord("x"))
    state = constraint.step(constraint.start, 97)                  # an id in stop_ids that is an ordinary token here
    assert state >= 0 and not constraint.ends(state) and constraint.ends(constraint.step(state, 97))


def test_a_schema_is_never_taken_for_an_expression():
    assert accepts(Constraint.regex("json", BYTES), "json") and accepts(Constraint("json", BYTES), "[1]")
    assert accepts(Constraint.json_schema({"const": 1}, BYTES), "1") and accepts(Constraint.json_schema(True, BYTES), "[1]")
    for bad in ("json", "a+", [], [{}], 3, 0.5, None):             # json.loads of a file may give each of them
        with pytest.raises(ValueError, match="not a schema"):
            Constraint.json_schema(bad, BYTES)


def test_numbers_within_limits_are_exact():
    rng = random.Random(7)
    for _ in range(60):
        low, high = sorted(rng.choice([round(rng.uniform(-3, 3), rng.randrange(4)), rng.randrange(-200, 200)]) for _ in range(2))
        step = rng.choice([None, None, 0.5, 0.25, 1.5, 0.01, 3, 12])
        schema = {"type": "number", rng.choice(["minimum", "exclusiveMinimum"]): low, rng.choice(["maximum", "exclusiveMaximum"]): high}
        try:
            constraint = Constraint(schema | ({"multipleOf": step} if step else {}), BYTES)
        except ValueError as error:
            assert "no finite text" in str(error)
            continue
        for text in [str(low), str(high), *(str(round(rng.uniform(low - 1, high + 1), rng.randrange(4))) for _ in range(30))]:
            x, a, b = Fraction(text), Fraction(str(low)), Fraction(str(high))
            fine = (a < x or a == x and "minimum" in schema) and (x < b or x == b and "maximum" in schema) \
                and (not step or (x / Fraction(str(step))).denominator == 1)
            written = text if not step or "." not in text else (text.rstrip("0").rstrip("."))      # no more places than the step
            assert accepts(constraint, written) == (fine and written not in ("-0", "-0.0")), (schema, step, written)


def test_a_pattern_is_searched_for_as_in_ecmascript():
    blanks = "\t\n\v\f\r \u00a0\u1680\u2000\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
    inside = lambda pattern, text: accepts(Constraint({"type": "string", "pattern": pattern}, BYTES), json.dumps(text, ensure_ascii=False))
    assert all(inside(r"^\s$", c) and not inside(r"^\S$", c) for c in blanks)
    assert not any(inside(r"^\s$", c) for c in "\x1c\x1f\x85\u180e\u200b")      # blanks for Python's str only
    assert not any(inside("^.$", c) for c in "\n\r\u2028\u2029") and inside("^.$", "\x85") and not inside(r"^\d$", "\u0663")
    for pattern in ("b", "^b", "b$", "^b$", "^a|b$", "(^a|b)c", "(a|b$)", "^", "$", "^$", "", "a*", "(^b$)|cc", "x?$"):
        for text in ("", "a", "b", "ab", "ba", "bb", "abc", "bac", "ac", "cc", "accb"):
            assert inside(pattern, text) == bool(re.search(pattern, text)), (pattern, text)


def test_plain_nesting_has_no_limit_and_recursion_neither():
    schema, text = {"type": "integer"}, "7"
    for i in range(60):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]} if i % 2 else {"type": "array", "items": schema, "minItems": 1}
        text = f'{{"a": {text}}}' if i % 2 else f"[{text}]"
    assert accepts(Constraint(schema, BYTES), text)
    chain = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}, "minItems": 1} for i in range(200)} | {"d200": {"const": 0}}
    assert accepts(Constraint({"$defs": chain, "$ref": "#/$defs/d0"}, BYTES), "[" * 200 + "0" + "]" * 200)
    left = Constraint({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "array", "items": {"$ref": "#/$defs/a"}}, {"type": "null"}]}},
                       "$ref": "#/$defs/a"}, BYTES)
    assert accepts(left, "[[null], null]") and accepts(left, "[" * 100 + "]" * 100) and not accepts(left, "[1]")
    assert accepts(Constraint("json", BYTES), "[" * 16 + "]" * 16) and not accepts(Constraint("json", BYTES), "[" * 17 + "]" * 17)


def nested(depth):
    return {"anyOf": [nested(depth - 1)]} if depth else {}


@pytest.mark.parametrize("what", [
    nested(900), {"enum": ["word %d" % i for i in range(30_000)]}, {"enum": ["a" * i for i in range(2000)]}, {"const": "abc" * 30_000},
    "a{1000000}", "(?:a{1000}){1000}", "(" * 3000 + ")" * 3000, "a{99999999999}", r"(?:(?:(?:\w{1,50}){1,50}){1,50}){1,50}", "(a|b)*a(a|b){30}", "(x+x+)+y",
    {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(2000)}}, {"type": "array", "minItems": 10 ** 9},
    {"$ref": "#/$defs/d59", "$defs": {f"d{i}": {"oneOf": [{"$ref": f"#/$defs/d{i - 1}"}] * 2} if i else {"type": "null"} for i in range(60)}},
    {"$ref": "#/$defs/d59", "$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i - 1}"}, {"type": "array", "items": {"$ref": f"#/$defs/d{i - 1}"}}]} if i
                                      else {"type": "null"} for i in range(60)}},
    {"oneOf": [{"type": "object", "properties": {"k": {"const": i}}, "required": ["k"]} for i in range(3000)]},
    {"type": "array", "prefixItems": [{"type": "string", "pattern": f"{i}"} for i in range(2000)]}], ids=range(17))
def test_hostile_input_is_quick_or_refused(what):
    start = time.process_time()
    try:
        constraint = Constraint(what, MERGED)
        state = constraint.start
        for _ in range(5):
            allowed = constraint.allowed(state, constraint.shortest + 9).tolist()
            state = constraint.step(state, allowed[0]) if allowed else state
    except ValueError as error:
        assert len(str(error)) < 600
    assert time.process_time() - start < 5


# ---- llguidance as a second oracle

def test_the_masks_are_those_of_llguidance():
    ll = pytest.importorskip("llguidance")

    class Vocabulary:
        tokens, eos_token_id, bos_token_id, special_token_ids = [bytes([b]) for b in range(256)] + [b"<end>"], 256, None, [256]

        def __call__(self, text):
            return list(text)

    tokenizer, rng, compared = ll.LLTokenizer(ll.TokenizerWrapper(Vocabulary())), random.Random(8), 0

    def walk_both(what, grammar, equal, steps=20):
        """Write with our masks; theirs must be equal, or hold at least ours."""
        matcher, constraint = ll.LLMatcher(tokenizer, grammar), Constraint(what, BYTES)
        assert not matcher.is_error(), matcher.get_error()
        state, written = constraint.start, []
        for left in range(constraint.shortest + steps, 0, -1):
            ours = set(constraint.allowed(state, 10 ** 6).tolist()) - {127} | ({256} if constraint.ends(state) else set())
            bits = matcher.compute_bitmask()
            theirs = {i for i in range(257) if bits[i // 8] >> i % 8 & 1}
            assert ours == theirs if equal else ours <= theirs, (what, bytes(written), ours ^ theirs)
            allowed = sorted({*constraint.allowed(state, left).tolist()} - {127})      # it never writes DEL in strings
            if not allowed:
                break
            written.append(rng.choice(allowed))
            state = constraint.step(state, written[-1])
            assert matcher.consume_token(written[-1]), (what, bytes(written))

    for pattern in ("ab*é?", "[a-c]{2,5}(x|[0-9]+)é?", "(a|aa){3,7}b", "(a?){20}", "([a-z]+ ?){1,4}\\.", "[é-ü😀]*x", "(ab?c|a(b|d))+", "a{0,3}b{2}|c*"):
        for _ in range(4):
            walk_both(pattern, ll.LLMatcher.grammar_from_regex(pattern), equal=True)
    for schema in ({"type": "integer", "minimum": 3, "maximum": 1205}, {"enum": ["ab", "abc", "b", 1]},
                   {"type": "string", "pattern": "^[a-z]{2,4}-[0-9]+$"}, {"type": "boolean"}):
        for _ in range(4):
            walk_both(schema, ll.LLMatcher.grammar_from_json_schema(schema), equal=True)
    for schema in ({"type": "integer", "multipleOf": 7}, {"type": "integer", "minimum": -57, "exclusiveMaximum": 8}, {"type": "string", "minLength": 2, "maxLength": 4}, SCHEMAS[1], SCHEMAS[2], SCHEMAS[4], {"oneOf": [{"type": "integer"}, {"type": "null"}]},
                   {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "boolean"}}}, "required": ["b"],
                    "additionalProperties": False}):
        for _ in range(4):
            walk_both(schema, ll.LLMatcher.grammar_from_json_schema(schema), equal=False, steps=40)
