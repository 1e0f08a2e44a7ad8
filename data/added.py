"""
Added tokens: texts that are one token wherever they occur, found before a text is split into words. Special tokens
(ends of documents and turns) are found only where they are allowed; the others (<think>, <tool_call>) always.

The rules are those of Hugging Face's tokenizers: the leftmost match, of these the longest; tokens with
normalized=False in the text as it is, then the others in the normalized parts between them.
"""
import unicodedata

import numpy as np
import regex

WORD, BLANK = regex.compile(r"\w"), regex.compile(r"\s")
FLAGS = ("lstrip", "rstrip", "single_word")


def added_token(name, i, **flags):
    """An entry of added_tokens in a tokenizer.json."""
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return dict(id=i, content=name) | plain | flags


class AddedTokens:
    """tokens: the added_tokens of a tokenizer.json. nfc: text is normalized after the first search."""

    def __init__(self, tokens, nfc=False):
        self.nfc, self.searches = nfc, []
        for normalized in (False, True):
            found = {self.normalize(token["content"]) if normalized else token["content"]: token
                     for token in reversed(tokens) if bool(token.get("normalized")) == normalized}
            longest_first = "|".join(map(regex.escape, sorted(found, key=len, reverse=True)))
            self.searches.append((regex.compile(longest_first), found) if found else None)

    def normalize(self, text):
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def split(self, text, allowed=(), literal=()):
        """Yield (part of the text, [(normalized part of that part, id of an added token or None), ...]). literal:
        positions at which no special token begins."""
        at = 0
        for part, i in self.search(text, self.searches[0], allowed, literal):
            inner = [place - at for place in literal if place >= at] if self.searches[1] else ()
            yield part, [(part, i)] if i is not None else \
                self.search(self.normalize(part), self.searches[1], allowed, inner)
            at += len(part)

    @staticmethod
    def search(text, search, allowed, literal=()):
        if search is None:
            return [(text, None)] if text else []
        parts, at = [], 0
        for match in search[0].finditer(text):
            token = search[1][match[0]]
            start, end = match.span()
            if token.get("special") and (token["content"] not in allowed or start in literal):
                continue
            if token.get("single_word") and (WORD.match(text[start - 1:start]) or WORD.match(text, end)):
                continue
            while token.get("lstrip") and start > at and BLANK.match(text, start - 1):
                start -= 1
            while token.get("rstrip") and BLANK.match(text, end):
                end += 1
            parts += [(text[at:start], None)] * (start > at) + [(text[start:end], token["id"])]
            at = end
        return parts + [(text[at:], None)] * (at < len(text))


def offsets(tokenizer, text, allowed, literal=()):
    """bpe.Tokenizer.encode_offsets."""
    ids, ends, end, sides = [], [], 0, []
    for original, parts in tokenizer.finder.split(text, allowed, literal):
        parts = [(part if i is not None else tokenizer.finder.normalize(part), i) for part, i in parts]
        sides.append((original, "".join(part for part, _ in parts)))
        for part, i in parts:
            for word in tokenizer.split(part) if i is None else [part]:
                found, at = tokenizer.merge_cached(word) if i is None else [i], end
                for j in found[:-1]:
                    at += len(tokenizer.bytes_of[j])
                    ends.append(at)
                end += len(word if isinstance(word, bytes) else word.encode("utf-8"))
                ends += [end] * bool(found)                        # bytes that are left out belong to the last token
                ids += found
    return ids, characters_at(ends, sides)


def characters_at(ends, parts):
    """Ends of tokens in bytes of the normalized text -> in characters of the text itself, rounded up.
    parts: [(text, normalized text), ...]"""
    if all(text == normalized and text.isascii() for text, normalized in parts):
        return ends
    borders, characters, at, count = [0], [0], 0, 0
    for text, normalized in parts:
        # NFC changes nothing across the borders of grapheme clusters
        same = text == normalized
        for cluster in text if same else regex.findall(r"\X", text):
            at += len((cluster if same else unicodedata.normalize("NFC", cluster)).encode("utf-8"))
            count += len(cluster)
            borders.append(at)
            characters.append(count)
    return np.array(characters)[np.searchsorted(borders, ends)].tolist()
