"""
Porter's stemmer (1980) with the changes that NLTK made: "connected", "connecting", "connections" -> "connect". ROUGE
and METEOR compare stems, so that a word counts as found in another form. Equal to nltk.stem.PorterStemmer (a test).
"""
from functools import lru_cache

_IRREGULAR = {"skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "innings": "inning", "outings": "outing",
              "cannings": "canning"}
_IRREGULAR |= {word: word for word in "sky news inning outing canning howe proceed exceed succeed".split()}
_STEP2 = [rule.split(":") for rule in (
    "ational:ate tional:tion enci:ence anci:ance izer:ize bli:ble entli:ent eli:e ousli:ous ization:ize ation:ate "
    "ator:ate alism:al iveness:ive fulness:ful ousness:ous aliti:al iviti:ive biliti:ble fulli:ful").split()]
_STEP3 = [rule.split(":") for rule in "icate:ic ative: alize:al iciti:ic ical:ic ful: ness:".split()]
_STEP4 = [(suffix, "") for suffix in
          "al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize".split()]


def _shape(word):
    """trouble -> ccvvccv, consonants and vowels; y is a vowel after a consonant. The count of "vc" is Porter's m."""
    shape = ""
    for letter in word:
        shape += "v" if letter in "aeiou" or letter == "y" and shape.endswith("c") else "c"
    return shape


def _measure(word):
    return _shape(word).count("vc")


def _ends_cvc(word):
    """wil, hop: a final e was probably cut off. NLTK adds two letters vowel + consonant."""
    return _shape(word).endswith("cvc") and word[-1] not in "wxy" or _shape(word) == "vc"


def _replace(word, rules, least):
    """Apply the first rule whose suffix fits, if the measure of what stands before it is above `least`."""
    for suffix, replacement in rules:
        if word.endswith(suffix):
            stem = word[:-len(suffix)]
            return stem + replacement if _measure(stem) > least else word
    return word


def _step1(word):
    """Plurals, -ed, -ing, and a final y: caresses -> caress, hopping -> hop, happy -> happi."""
    if word.endswith("ies"):
        word = word[:-1] if len(word) == 4 else word[:-2]
    elif word.endswith("sses"):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    if word.endswith("ied"):
        word = word[:-1] if len(word) == 4 else word[:-2]
    elif word.endswith("eed"):
        word = word[:-1] if _measure(word[:-3]) else word
    else:
        stem = word[:-2] if word.endswith("ed") else word[:-3] if word.endswith("ing") else ""
        if "v" in _shape(stem):
            word = stem
            if word.endswith(("at", "bl", "iz")):
                word += "e"
            elif word[-2:-1] == word[-1] and _shape(word).endswith("c"):
                word = word if word[-1] in "lsz" else word[:-1]
            elif _measure(word) == 1 and _ends_cvc(word):
                word += "e"
    return word[:-1] + "i" if word.endswith("y") and len(word) > 2 and _shape(word[:-1]).endswith("c") else word


@lru_cache(maxsize=1 << 16)
def porter_stem(word):
    """Porter's stemmer (1980) with NLTK's changes, which rouge-score and nltk's METEOR use. word: lower case."""
    if word in _IRREGULAR or len(word) < 3:
        return _IRREGULAR.get(word, word)
    word = _step1(word)
    while word.endswith("alli") and _measure(word[:-4]):
        word = word[:-2]
    if word.endswith("logi"):
        word = word[:-1] if _measure(word[:-3]) else word
    else:
        word = _replace(word, _STEP2, 0)
    word = _replace(word, _STEP3, 0)
    if not word.endswith("ion") or word.endswith(("sion", "tion")):
        word = _replace(word, _STEP4, 1)
    if word.endswith("e") and (_measure(word[:-1]) > 1 or _measure(word[:-1]) == 1 and not _ends_cvc(word[:-1])):
        word = word[:-1]
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word
