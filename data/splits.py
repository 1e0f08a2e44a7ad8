"""
How a tokenizer.json splits text into words: the steps Split, Digits, Punctuation and ByteLevel of Hugging Face's
tokenizers, one after the other (DeepSeek, StarCoder, Falcon, SmolLM). bpe.py needs this only for files of others.

    [{"type": "Digits", ...}, {"type": "ByteLevel", ...}] -> function: text -> [bytes of each word]
"""
import regex

from data.words import to_bytes

# ASCII signs such as $ and + count as punctuation too
PUNCTUATION = r"[!-/:-@\[-`{-~\p{P}]"
PROBE = "Aé1 ?\n\t\0 你😀\u0301' "
BEHAVIORS = ("Isolated", "Contiguous", "MergedWithPrevious", "MergedWithNext")


def compile_pattern(pattern, names=()):
    """A split pattern whose matches are the words. ValueError: it does not match all text, or is no pattern."""
    try:
        split = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"split pattern {pattern!r}: {error}. By name: {', '.join(names)}") from None
    if split.groups or "".join(split.findall(PROBE)) != PROBE:
        raise ValueError(f"split pattern {pattern!r}: it must match all text and have no capturing groups. "
                         f"By name: {', '.join(names)}")
    return split


def flat_steps(pre_tokenizer):
    """The steps of a pre_tokenizer, whose Sequences may be nested."""
    if (pre_tokenizer or {}).get("type") == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in flat_steps(part)]
    return [pre_tokenizer] if pre_tokenizer else []


def compile_step(expression):
    """The regular expression of a step. ValueError: it means something else in the library's engine, Oniguruma, where
    ^ and $ match at every line and a set may contain sets."""
    sets = r"\[\^?\]?[^\]]*\]"
    outside = regex.sub(r"\\.", "x", expression)
    nested = any("[" in found[1:].replace("[:", "") or "&&" in found for found in regex.findall(sets, outside))
    if nested or regex.search(r"[\^$]", regex.sub(sets, "", outside)) or regex.search(r"\\[hHRKyYOZzGg]", expression):
        raise ValueError(f"the regular expression {expression!r}")
    return regex.compile(expression)


def plain_step(step, gpt2_pattern):
    """(regular expression, behavior, invert) of one step, or None for a ByteLevel that splits nothing. KeyError: an
    unknown type."""
    kind = step["type"]
    if kind == "Split":
        pattern = step["pattern"]
        expression = pattern["Regex"] if "Regex" in pattern else regex.escape(pattern["String"])
        return expression, step["behavior"], bool(step.get("invert"))
    if kind == "Digits":
        return r"\p{N}", "Isolated" if step.get("individual_digits") else "Contiguous", False
    if kind == "Punctuation":
        return PUNCTUATION, step.get("behavior", "Isolated"), False
    if kind == "ByteLevel":
        return (gpt2_pattern, "Isolated", False) if step.get("use_regex", True) else None
    raise KeyError(kind)


def one_pattern(steps, gpt2_pattern):
    """One regular expression whose matches are the words of these steps, or None. It makes tiktoken usable."""
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return gpt2_pattern
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        expression, behavior, invert = plain_step(steps[0], gpt2_pattern)
        try:
            compile_step(expression)
            return compile_pattern(expression).pattern if (behavior, invert) == ("Isolated", False) else None
        except ValueError:
            return None
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        # SmolLM and StarCoder: a digit is a word of its own, and blanks before it keep their last space
        known = r"| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
        if gpt2_pattern.endswith(known):
            return gpt2_pattern.removesuffix(known) + r"|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
    return None


def cut(text, pattern, behavior, invert):
    """Split one piece of text. A piece is a match, or what lies between two matches; `behavior` joins some of them."""
    pieces, at = [], 0
    for match in pattern.finditer(text):
        if match.end() > match.start():
            pieces += [(text[at:match.start()], invert)] * (match.start() > at) + [(match[0], not invert)]
            at = match.end()
    pieces += [(text[at:], invert)] * (at < len(text))
    if behavior == "Isolated":
        return [piece for piece, _ in pieces]
    if behavior == "MergedWithNext":
        pieces.reverse()
    joined, before = [], False
    for piece, matched in pieces:
        join = matched == before if behavior == "Contiguous" else matched and not before
        if join and joined:
            joined[-1] = piece + joined[-1] if behavior == "MergedWithNext" else joined[-1] + piece
        else:
            joined.append(piece)
        before = matched
    return joined[::-1] if behavior == "MergedWithNext" else joined


def split_by_steps(steps, gpt2_pattern, spell, unspell):
    """A function: text -> words as bytes. Steps after ByteLevel see the spelled form, in which each byte is a
    character: they may split inside a character of the text, as Falcon's do. ValueError: a behavior that drops text."""
    before, after, seen = [], [], False
    for step in steps:
        found = plain_step(step, gpt2_pattern)
        if found:
            expression, behavior, invert = found
            if behavior not in BEHAVIORS:
                raise ValueError(f"{step['type']} with behavior {behavior}")
            (after if seen else before).append((compile_step(expression), behavior, invert))
        seen = seen or step["type"] == "ByteLevel"

    def words(text):
        pieces = [text]
        for rule in before:
            pieces = [part for piece in pieces for part in cut(piece, *rule)]
        if not after:
            return [to_bytes(piece) for piece in pieces if piece]
        pieces = [spell(to_bytes(piece)) for piece in pieces]
        for rule in after:
            pieces = [part for piece in pieces for part in cut(piece, *rule)]
        return [unspell(piece) for piece in pieces if piece]
    return words
