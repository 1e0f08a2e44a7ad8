"""
The rules of data/curate.py, each a small function of one text: normalization, language, the quality rules of Gopher and
C4, personal data, word lists.

Papers  Gopher (Rae 2021, arXiv:2112.11446, appendix A.1), C4 (Raffel 2020, arXiv:1910.10683, section 2.2). Details
        that a paper leaves open follow datatrove, which built FineWeb (arXiv:2406.17557); a test compares the results.
        C4 needs 5 words per line and 3 sentences per page, as in the paper; datatrove's defaults are 3 and 5.
"""
import ipaddress
import re
import unicodedata
from collections import Counter

from data.dedup import words_of


# ---- normalization

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffd\u200b\u2060\u00ad]")


def drop_controls(text):
    """Line ends become \\n; control characters, byte order marks, soft hyphens, zero-width spaces, U+FFFD are removed.
    The joiners of emoji and Indic letters (U+200C, U+200D) stay."""
    return CONTROLS.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def strip_accents(text):
    """é -> e. Do not use it for languages whose letters carry such marks (German, Vietnamese). Hangul syllables and the
    voicing marks of kana (U+3099, U+309A) stay."""
    plain = (c for c in unicodedata.normalize("NFD", text) if c in "\u3099\u309a" or unicodedata.category(c) != "Mn")
    return unicodedata.normalize("NFC", "".join(plain))


# ---- language: decided by the script; for the Latin script by frequent words

STOP_WORDS = {name: frozenset(words.split()) for name, words in {
    "en": "the of and to in a is that for it as was with be by on not he i this are or his from at which but have "
          "an had",
    "de": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an werden aus "
          "er hat dass einer einem einen sie nach wird bei",
    "fr": "de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se le ce il sont avec ou "
          "son cette aux l d",
    "es": "de la que el en y a los del se las por un para con no una su al lo es como más pero sus le o este sí "
          "porque está",
    "it": "di e il la che in un a per è una del non le con si da i sono come della ha nel alla più al gli dei lo delle",
    "pt": "de a o que e do da em um para é com não uma os no se na por mais as dos como mas foi ao ele das tem à "
          "seu sua",
    "nl": "de van een het en in is dat op te zijn met voor niet aan er om ook als dan bij maar uit kan worden deze "
          "naar wordt",
    "sv": "och i att det som en på är av för med till den har de inte om ett men var jag från så kan när eller vi "
          "kunde ska",
    "da": "og i at det er en til af på for med der den de ikke som et har kan om var fra eller ved skal blev efter "
          "også kunne",
    "nb": "og i det er en til av på for med som den de ikke et har kan om var fra eller ved skal ble etter også "
          "kunne å",
    "fi": "ja on ei se että oli ovat mutta kun hän niin tai joka myös voi olla sen ole mukaan kuin jos tämä vain ollut",
    "pl": "i w na z do nie się że jest to o a jak po co od przez dla za może lub być tym tego są przy jego nie można",
    "cs": "a v se na je že s z do to i o k ve pro za by ale jako od po jsou nebo který jsem tak být není při nelze byl",
    "hu": "a az és hogy nem is egy van meg ez de volt csak el vagy már még ki mint azt ha lehet ezt kell fel nincs",
    "tr": "ve bir bu da de için ile çok olarak ne daha olan gibi ama en kadar o değil her var sonra yok veya ya olduğu",
    "ro": "de și în la a cu pe nu că din un o este care mai pentru se sunt ca fost sau dar prin după lui al ai",
    "vi": "và của là có trong không được cho một các những với người để này đã từ khi về đến thì ra lại tại",
    "id": "yang dan di dari untuk dengan tidak ini dalam itu pada adalah ke akan oleh juga ada atau dapat karena",
}.items()}
SCRIPTS = {  # letters of a script, and letters that occur in one of its languages only (None: the usual language)
    "[\u0370-\u03ff]": {None: "el"},
    "[\u0400-\u04ff]": {"[іїєґІЇЄҐ]": "uk", "[ђјљњћџЂЈЉЊЋЏ]": "sr", "[ыэёЫЭЁ]": "ru", "ъ": "bg", None: "ru"},
    "[\u0590-\u05ff]": {None: "he"},
    "[\u0600-\u06ff]": {"[پچژگی]": "fa", None: "ar"},
    "[\u0900-\u097f]": {None: "hi"},
    "[\u0e00-\u0e7f]": {None: "th"},
    "[\uac00-\ud7af]": {None: "ko"},
    "[\u3040-\u30ff\u4e00-\u9fff]": {"[\u3040-\u30ff]": "ja", None: "zh"},
}
LANGUAGES = sorted({*STOP_WORDS, *(name for rows in SCRIPTS.values() for name in rows.values())})
LETTER = re.compile(r"[^\W\d_]")
SEEN = 20_000         # characters at the start of a text that are looked at


def language(text):
    """Code of the language (LANGUAGES), or "unknown" if fewer than one word in twelve is a frequent word of any."""
    text = text[:SEEN]
    letters = len(LETTER.findall(text))
    if not text.isascii():
        for script, rows in SCRIPTS.items():
            if len(re.findall(script, text)) > 0.3 * letters:
                share = {name: len(re.findall(mark, text)) for mark, name in rows.items() if mark}
                name = max(share, key=share.get, default=None)
                return name if name and share[name] > 0.005 * letters else rows[None]
    words = Counter(re.findall(r"[^\W\d_]+", text.lower()))
    total = sum(words.values())
    share = {name: sum(words[word] for word in stops) for name, stops in STOP_WORDS.items()}
    best = max(share, key=share.get)
    return best if total and share[best] >= total / 12 else "unknown"


# ---- Gopher: is it prose? (the last quality rule limits it to English)

BULLETS = ("•", "-", "*")
DOTS = ("...", "…")


def gopher(text):
    """The first quality rule of Gopher (A.1.1) that the text breaks, or None."""
    words = text.split()
    real = [word for word in words if any(map(str.isalnum, word))]          # without lone punctuation
    if not 50 <= len(real) <= 100_000:
        return "words not 50 to 100,000"
    if not 3 <= sum(map(len, real)) / len(real) <= 10:
        return "mean word length not 3 to 10"
    if text.count("#") > 0.1 * len(words) or sum(map(text.count, DOTS)) > 0.1 * len(words):
        return "more than 0.1 # or ... per word"
    lines = [line.strip() for line in text.splitlines()]
    if sum(line.startswith(BULLETS) for line in lines) > 0.9 * len(lines):
        return "more than 90 % of the lines are bullets"
    if sum(line.endswith(DOTS) for line in lines) > 0.3 * len(lines):
        return "more than 30 % of the lines end in ..."
    if sum(any(map(str.isalpha, word)) for word in words) < 0.8 * len(words):
        return "fewer than 80 % of the words have a letter"
    if len({"the", "be", "to", "of", "and", "that", "have", "with"}.intersection(words)) < 2:
        return "fewer than 2 of: the be to of and that have with"
    return None


TOP_GRAMS = {2: 0.20, 3: 0.18, 4: 0.16}                                     # Gopher, table A1
REPEATED_GRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def repeated(items):
    """(number, characters) of the items that occurred before in the list."""
    again = [item for item, count in Counter(items).items() for _ in range(count - 1)]
    return len(again), sum(map(len, again))


def repetition(text):
    """The first repetition rule of Gopher (A.1.1, table A1) that the text breaks, or None."""
    for name, items in (("paragraphs", re.split(r"\n{2,}", text.strip())), ("lines", re.split(r"\n+", text))):
        count, size = repeated(items)
        if count > 0.3 * len(items) or size > 0.2 * len(text):
            return f"repeated {name}: more than 30 %, or 20 % of the characters"
    words = text.split()
    for n, limit in TOP_GRAMS.items():
        grams = Counter(zip(*(words[i:] for i in range(n))))
        if grams:
            gram, count = max(grams.items(), key=lambda item: item[1])
            if count * (sum(map(len, gram)) + n - 1) > limit * len(text):
                return f"one run of {n} words is more than {limit:.0%} of the text"
    for n, limit in REPEATED_GRAMS.items():
        grams = list(zip(*(words[i:] for i in range(n))))
        if len(set(grams)) == len(grams):
            return None                                                     # then no longer run repeats either
        seen, size, i = set(), 0, 0
        while i < len(grams):
            again = grams[i] in seen
            seen.add(grams[i])
            size += sum(map(len, grams[i])) if again else 0
            i += n if again else 1                                          # count each character once
        if size > limit * len(text):
            return f"repeated runs of {n} words are more than {limit:.0%} of the text"
    return None


# ---- C4: keep the lines that are sentences, and the pages that have enough of them

POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)")


def sentences(line):
    """Number of sentences in a line; a rest without an end mark counts as one."""
    ends = [match.end() for match in SENTENCE_END.finditer(line)]
    return len(ends) + bool(line[ends[-1] if ends else 0:].strip())


def c4(text):
    """(text of the lines that stay, None), or (None, why the page is dropped)."""
    kept, count = [], 0
    for line in text.splitlines():
        words = line.split()
        line = CITATION.sub("", line.strip())
        low = line.lower()
        if len(words) < 5 or max(map(len, words)) > 1000:
            continue
        if not line.endswith((".", "!", "?", '"', "'", "”")) or line.endswith("..."):
            continue
        if "lorem ipsum" in low:
            return None, "lorem ipsum"
        if "javascript" in low:
            continue
        if "{" in line:
            return None, "a curly bracket"
        if any(phrase in low for phrase in POLICY):
            continue
        kept.append(line)
        count += sentences(line)
    return ("\n".join(kept), None) if count >= 3 else (None, "fewer than 3 sentences")


# ---- personal data -> placeholders

def luhn(digits):
    """The check sum of card numbers: with every second digit from the right doubled, the digit sum ends in 0."""
    numbers = [int(d) for d in reversed(digits)]
    return sum(numbers[::2] + [sum(divmod(2 * d, 10)) for d in numbers[1::2]]) % 10 == 0


def is_card(found):
    digits = re.sub(r"\D", "", found)
    return 13 <= len(digits) <= 19 and digits[0] in "23456" and len(set(digits)) > 1 and luhn(digits)


def is_iban(found):
    code = found.replace(" ", "")
    return 15 <= len(code) <= 34 and int("".join(str(int(c, 36)) for c in code[4:] + code[:4])) % 97 == 1   # ISO 13616


def is_ip(found):
    if ":" not in found and max(map(len, found.split("."))) == 1:
        return False                                                        # 1.2.3.4 is a version or a section
    try:
        return ipaddress.ip_address(found).is_global                        # not 127.0.0.1, not 192.168.*
    except ValueError:
        return False


def is_phone(found):
    return 9 <= len(re.sub(r"\D", "", found)) <= 15


# Placeholder, a character that must occur, pattern, further check. Every pattern reads a text in linear time. It begins
# with a set of characters and has its look-behind second, which is three times as fast.
PERSONAL_RULES = [
    ("<EMAIL>", "@", r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b", None),
    ("<IBAN>", "", r"[A-Z](?<!\w[A-Z])[A-Z]\d\d(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", is_iban),
    ("<CARD>", "", r"\d(?<![\w.-]\d)(?:[ -]?\d){12,18}(?![\w-])", is_card),
    ("<SSN>", "-", r"[0-8](?<![\w-]\d)\d\d-(?<!000-)(?<!666-)(?!00)\d\d-(?!0000)\d{4}(?![\w-])", None),
    ("<IP>", ".", r"\d(?<![\w.:]\d)\d{0,2}(?:\.\d{1,3}){3}(?!\w|\.\d)", is_ip),     # a port may follow
    ("<IP>", ":", r"[23](?<![\w.:]\d)[0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![\w:])",   # 2000::/3
     is_ip),
    ("<PHONE>", "+", r"\+(?<![\w.+-]\+)\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,4}(?![\w-])",
     is_phone),
    ("<PHONE>", "", r"[(\d](?<![\w.+-][(\d])(?:(?<=\()\d{3}\) ?|(?<=\d)\d\d[ .-])\d{3}[.-]\d{4}(?![\w-])", None),
]
PERSONAL = [(mark, needed, re.compile(pattern), check) for mark, needed, pattern, check in PERSONAL_RULES]


def hide_personal(text):
    """Replace e-mail and IP addresses and card, account and telephone numbers by a placeholder such as <EMAIL>."""
    for mark, needed, pattern, check in PERSONAL:
        if needed in text:
            text = pattern.sub(lambda match: mark if check is None or check(match[0]) else match[0], text)
    return text


# ---- word lists

RUDE = "arsehole asshole bastard bitch bollocks bullshit cock cocksucker cunt dickhead fuck fucked fucker fucking " \
       "motherfucker porn pussy shit shitty slut twat wanker whore".split()


def word_list(words):
    """A function text -> a listed word or phrase that occurs in it, or None. C4 drops a page that has a single one."""
    terms = sorted({words_of(word) for word in words if word.strip()})
    single = {term for term in terms if b" " not in term}
    phrases = [b" %s " % term for term in terms if b" " in term]

    def first(text):
        found = words_of(text)
        hits = single.intersection(found.split(b" "))
        hits |= {phrase.strip() for phrase in phrases if phrase in b" %s " % found}
        return min(hits).decode("utf-8") if hits else None
    return first
