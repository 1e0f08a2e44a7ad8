"""constrain.py against Python's re, json and jsonschema, and its masks against one token at a time."""
import json
import math
import random
import re
import warnings

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
    ({"type": "integer", "minimum": 5, "maximum": 4}, "no finite text"), ({"type": "integer", "minimum": 0.5}, "must be integers"),
    ({"type": ["number", "integer"], "minimum": 1}, "only supported for type integer"), ({"type": "number", "maximum": 1}, "'maximum'"), ({"type": "string", "minLength": -1}, "minLength"),
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
        write(Constraint("((a?){500}){500}", BYTES), random.Random(0), 10, BYTES)


def test_masks_are_those_of_one_token_at_a_time():
    tokenizer = Tokenizer.load(DATA / "gpt2") if (DATA / "gpt2").is_dir() else MERGED
    for what in ("json", r"( ?[a-z]+)+\.", SCHEMAS[0]):
        constraint, rng, state = Constraint(what, tokenizer), random.Random(5), None
        state = constraint.start
        for left in (40, 39, 38, 4, 3):
            if left < constraint.fewest[state]:
                break
            allowed = set(constraint.allowed(state, left).tolist())
            some = rng.sample(sorted(constraint.bytes_of), min(3000, len(constraint.bytes_of))) + sorted(allowed)[:200]
            for i in some:
                at = state
                for b in tokenizer.bytes_of[i]:
                    constraint.build(at)
                    at = int(constraint.table[at, b])
                    if at < 0:
                        break
                assert (i in allowed) == (at >= 0 and constraint.fewest[at] < left)
            state = constraint.step(state, rng.choice(sorted(allowed)))
