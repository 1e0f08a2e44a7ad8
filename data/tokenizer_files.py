"""
How tokenizers are stored: Hugging Face's tokenizer.json with tokenizer_config.json and chat templates, SentencePiece's
tokenizer.model, BERT's vocab.txt, and GPT-2's vocab.bpe with encoder.json (or merges.txt with vocab.json).

Each is read as two dicts, spec (as in tokenizer.json) and config (as in tokenizer_config.json). `byte_level` turns them
into the arguments of bpe.Tokenizer; what it cannot represent runs in data/foreign.py.
"""
import json
import os
from itertools import chain
from pathlib import Path

from data.added import FLAGS, added_token
from data.sentencepiece_model import read_sentencepiece
from data.splits import flat_steps, one_pattern, split_by_steps

# Both formats write bytes as printable characters: a visible Latin-1 byte as itself, the others from U+0100 upward.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_ORDER = VISIBLE + [b for b in range(256) if b not in VISIBLE]  # bytes in the order of their characters
BYTE_TO_CHAR = {b: chr(b) if b in VISIBLE else chr(256 + i - len(VISIBLE)) for i, b in enumerate(BYTE_ORDER)}
CHAR_TO_BYTE = dict.fromkeys(range(256), 0xFFFF) | {ord(c): b for b, c in BYTE_TO_CHAR.items()}    # 0xFFFF: no byte

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MOST_IDS = 10_000_000                                              # the largest vocabularies have 300,000


class NotByteLevel(ValueError):
    """bpe.Tokenizer cannot represent this tokenizer; data/foreign.py may."""


def spell(token):
    """Bytes of a token -> the printable characters that stand for them in the files: b" the" -> "Ġthe"."""
    return token.decode("latin-1").translate(BYTE_TO_CHAR)


def unspell(text):
    """The inverse of `spell`. UnicodeEncodeError: the text is not such a spelling."""
    return text.translate(CHAR_TO_BYTE).encode("latin-1")


# ---- writing

def write_files(folder, spec, config, chat_template):
    """Write tokenizer.json and tokenizer_config.json. The chat template stands in the second, as a text or as a list of
    named ones, and also in chat_template.jinja where such a file is there, because transformers prefers it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Without this tokenizer_class, transformers 5 would use the split pattern of the model's family instead of ours.
    config = {key: value for key, value in config.items() if key not in ("chat_template", "auto_map", "backend")}
    config |= dict(tokenizer_class="PreTrainedTokenizerFast")
    config.setdefault("clean_up_tokenization_spaces", False)
    if chat_template:
        named = isinstance(chat_template, dict)
        config["chat_template"] = [{"name": name, "template": text} for name, text in chat_template.items()] if named \
            else chat_template
    files = [("tokenizer.json", json.dumps(spec, ensure_ascii=False, indent=1) + "\n"),
             ("tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=1) + "\n")]
    if (folder / "chat_template.jinja").exists():
        text = chat_template.get("default", "") if isinstance(chat_template, dict) else chat_template or ""
        files.append(("chat_template.jinja", text))
    for name, text in files:
        temporary = folder / (name + ".tmp")
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, folder / name)


def write_tokenizer(folder, tokenizer):
    """Write a bpe.Tokenizer as transformers reads it."""
    flags = {token["content"]: token for token in tokenizer.added_tokens}
    names = tokenizer.specials | tokenizer.added
    added = [flags.get(name) or added_token(name, i) for name, i in sorted(names.items(), key=lambda item: item[1])]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
    # The vocabulary contains the special tokens too: transformers ignores the ids of added_tokens when ids have gaps.
    model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                 fuse_unk=False, byte_fallback=False, ignore_merges=tokenizer.ignore_merges,
                 vocab={spell(token): i for token, i in tokenizer.tokens.items()} | names,
                 merges=[[spell(a), spell(b)] for a, b in tokenizer.merges])
    spec = dict(version="1.0", truncation=None, padding=None, added_tokens=added,
                normalizer={"type": "NFC"} if tokenizer.nfc else None,
                pre_tokenizer={"type": "Sequence", "pretokenizers": tokenizer.steps or [split, level]},
                post_processor=post_processor(tokenizer.before, tokenizer.after,
                                              {i: name for name, i in names.items()}),
                decoder=level | {"use_regex": True}, model=model)
    write_files(folder, spec, tokenizer.chat_config, tokenizer.chat_template)


def post_processor(before, after, names):
    """The post_processor that puts the ids `before` and `after` around a text; None if there are none."""
    if not before and not after:
        return None
    first, last = ([{"SpecialToken": {"id": names[i], "type_id": 0}} for i in ids] for ids in (before, after))
    single = [*first, {"Sequence": {"id": "A", "type_id": 0}}, *last]
    pair = single + [{"Sequence": {"id": "B", "type_id": 1}}]
    tokens = {names[i]: {"id": names[i], "ids": [i], "tokens": [names[i]]} for i in [*before, *after]}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


# ---- reading: files -> spec, config

def find_tokenizer(path):
    """The tokenizer file behind a path: the file itself, or the first of these names in a folder."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    names = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.bpe", "merges.txt", "vocab.txt")
    names = names if path.is_dir() else (path.name,)
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{path}: no such tokenizer. Train one: python bpe.py PATH... --out=FOLDER")
    return file


def read_files(file):
    """(spec, config) of a file of find_tokenizer and of those beside it."""
    config = read_config_files(file.parent)
    if file.name.startswith(("vocab.bpe", "encoder.json", "merges.txt")):
        return read_gpt2(file), config
    if file.suffix == ".json":
        spec = read_object(file)
        # transformers reads add_bos_token and add_eos_token only where there is no tokenizer.json
        spec["post_processor"] = spec.get("post_processor") or {"type": "Sequence", "processors": []}
        return as_llama(spec, config, file.parent), config
    if file.suffix == ".txt":
        return read_vocab_txt(file, config)
    spec, names = read_sentencepiece(file.read_bytes(), legacy=config.get("legacy") is True)
    return spec, names | config


def read_object(file):
    data = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise ValueError(f"{file.name} must hold a JSON object, it holds {type(data).__name__}")
    return data


def read_config_files(folder):
    """tokenizer_config.json, with the tokens of special_tokens_map.json, and the templates in files of their own, which
    replace those of the config, as in transformers. chat_template is a text, a dict of named ones, or missing."""
    config = read_object(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    if (folder / "special_tokens_map.json").is_file() and "added_tokens_decoder" not in config:
        config |= read_object(folder / "special_tokens_map.json")
    files = [("default", folder / "chat_template.jinja")]
    files += [(path.stem, path) for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))]
    found = {name: path.read_text(encoding="utf-8") for name, path in files if path.is_file()}
    if found:
        config["chat_template"] = found["default"] if list(found) == ["default"] else found
    if isinstance(config.get("chat_template"), list):
        config["chat_template"] = {item["name"]: item["template"] for item in config["chat_template"]}
    return config


def read_gpt2(file):
    """GPT-2's vocab.bpe with encoder.json, or merges.txt with vocab.json."""
    names = ("merges.txt", "vocab.json") if file.name == "merges.txt" else ("vocab.bpe", "encoder.json")
    vocab = read_object(file.parent / names[1])
    lines = (file.parent / names[0]).read_text(encoding="utf-8").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    made = {a + b for a, b in merges}                              # the other tokens are bytes, and <|endoftext|>
    added = [added_token(name, i) for name, i in vocab.items() if len(name) > 1 and name not in made]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return dict(added_tokens=added, normalizer=None, pre_tokenizer=level, post_processor=None, decoder=level,
                model=dict(type="BPE", vocab=vocab, merges=merges))


def read_vocab_txt(file, config):
    """BERT's vocab.txt: a token a line."""
    lines = file.read_text(encoding="utf-8").split("\n")
    vocab = {line.rstrip("\r"): i for i, line in enumerate(lines[:-1] if lines[-1] == "" else lines)}
    names = dict(unk_token="[UNK]", sep_token="[SEP]", pad_token="[PAD]", cls_token="[CLS]", mask_token="[MASK]")
    config = {key: name for key, name in names.items() if name in vocab} | config
    around = [{"SpecialToken": {"id": text_of(config.get(key)), "type_id": 0}} for key in ("cls_token", "sep_token")]
    tokens = {text_of(config.get(key)): vocab.get(text_of(config.get(key))) for key in ("cls_token", "sep_token")}
    if text_of(config.get("unk_token")) not in vocab or None in tokens.values():
        raise ValueError("only the vocabulary of a BERT can be read, with its [CLS], [SEP] and [UNK]")
    spec = dict(added_tokens=[added_token(text_of(config[key]), vocab[text_of(config[key])]) for key in names
                              if text_of(config.get(key)) in vocab],
                normalizer={"type": "BertNormalizer", "clean_text": True,
                            "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
                            "strip_accents": config.get("strip_accents"),
                            "lowercase": config.get("do_lower_case", True)},
                pre_tokenizer={"type": "BertPreTokenizer"},
                post_processor={"type": "TemplateProcessing",
                                "single": [around[0], {"Sequence": {"id": "A", "type_id": 0}}, around[1]],
                                "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]}
                                                   for name, i in tokens.items()}},
                decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
                model=dict(type="WordPiece", unk_token=text_of(config["unk_token"]), continuing_subword_prefix="##",
                           max_input_chars_per_word=100, vocab=vocab))
    return spec, config


def as_llama(spec, config, folder):
    """What transformers 5 makes of a tokenizer.json whose tokenizer_class is LlamaTokenizer: it keeps the vocabulary
    and replaces the steps around it, so that "▁" is put only before the whole text. Mistral's folders stay as they are.
    """
    kind = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    model_type = read_object(folder / "config.json").get("model_type") if (folder / "config.json").is_file() else None
    steps = [step.get("type") for step in flat_steps(spec.get("pre_tokenizer"))]
    if kind != "LlamaTokenizer" or model_type not in (None, "llama") or "ByteLevel" in steps:
        return spec
    scheme = "never" if config.get("add_prefix_space") is False else "always" if config.get("legacy") else "first"
    decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * (scheme != "never")
    return spec | dict(normalizer=None, decoder={"type": "Sequence", "decoders": decoders}, pre_tokenizer={
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False})


# ---- what spec and config say together

def text_of(token):
    """tokenizer_config.json writes a token as a text or as {"content": text, ...}."""
    return token.get("content") if isinstance(token, dict) else token


def named_ids(specials, config):
    """ids of bos, eos, unk and pad, or None. <|endoftext|> ends a document whatever ends an answer."""
    bos, eos, unk, pad = (specials.get(text_of((config or {}).get(f"{name}_token"))) for name in
                          ("bos", "eos", "unk", "pad"))
    eos, pad = specials.get("<|endoftext|>", eos), specials.get("<|pad|>", pad)
    # Losses ignore padding. If it were the end-of-text id, no model would learn to end a text.
    return bos, eos, unk, None if pad == eos else pad


def vocabulary(spec):
    """{text: id} of the model, without added tokens. ValueError: an id that is none, or two tokens with one id."""
    vocab = spec["model"]["vocab"]
    vocab = {text: i for i, (text, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
    if len(set(vocab.values())) < len(vocab):
        raise ValueError("its vocabulary gives two tokens the same id")
    for text, i in vocab.items():
        if type(i) is not int or not 0 <= i < MOST_IDS:
            raise ValueError(f"token {text!r} has the id {i!r}; ids are whole numbers below {MOST_IDS:,}")
    return vocab


def all_added(spec, config):
    """The added tokens as dicts. The named ones of the config (bos_token, ...) are special tokens in any case; those
    that are nowhere else get the next free ids, as in transformers."""
    vocab, found = vocabulary(spec), {}
    for token in spec.get("added_tokens") or []:
        name, i = token["content"], token["id"]
        if type(i) is not int or not 0 <= i < MOST_IDS or not isinstance(name, str) or not name:
            raise ValueError(f"added token {name!r} has the id {i!r}; ids are whole numbers below {MOST_IDS:,}")
        if vocab.get(name, i) != i:
            raise ValueError(f"added token {name!r} has the id {i}, but {vocab[name]} in the vocabulary")
        flags = {key: bool(token.get(key)) for key in (*FLAGS, "normalized")}
        found.setdefault(name, added_token(name, i, **flags, special=bool(token.get("special", True))))
    names = [config.get(key) for key in NAMED]
    for key in ("extra_special_tokens", "additional_special_tokens"):
        more = config.get(key) or []
        names += more.values() if isinstance(more, dict) else more
    used = {i: name for name, i in vocab.items()}
    for name, token in found.items():
        if used.setdefault(token["id"], name) != name:
            raise ValueError(f"tokens {used[token['id']]!r} and {name!r} have the same id {token['id']}")
    for token in names:
        name = text_of(token)
        if not name or not isinstance(name, str):
            continue
        if name not in found:
            i = vocab[name] if name in vocab else max(used, default=-1) + 1
            flags = {flag: bool(token.get(flag)) for flag in FLAGS} if isinstance(token, dict) else {}
            used[i], found[name] = name, added_token(name, i, **flags)
        found[name]["special"] = True
    return list(found.values())


def ids_around(spec, config, added):
    """(ids before, ids after) that are put around every text: by the post_processor, or where there is none by
    add_bos_token and add_eos_token."""
    ids = {token["content"]: token["id"] for token in added}
    post = spec.get("post_processor")
    if not post:
        around = []
        for flag, key in (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token")):
            name = text_of(config.get(key))
            around.append([ids[name]] if config.get(flag) is True and name in ids else [])
        return tuple(around)
    before, after = [], []
    for step in post["processors"] if post["type"] == "Sequence" else [post]:
        if step["type"] == "TemplateProcessing":
            parts, place = ([], []), 0
            for item in step["single"]:
                if "Sequence" in item:
                    place = 1
                else:
                    parts[place].extend(step["special_tokens"][item["SpecialToken"]["id"]]["ids"])
        elif step["type"] in ("RobertaProcessing", "BertProcessing"):
            parts = [step["cls"][1]], [step["sep"][1]]
        else:
            continue                                               # ByteLevel trims offsets, and puts nothing anywhere
        before, after = parts[0] + before, after + parts[1]
    return before, after


# ---- spec, config -> bpe.Tokenizer

def byte_level(spec, config, gpt2_pattern):
    """Arguments of bpe.Tokenizer. NotByteLevel: it cannot represent this tokenizer."""
    model, normalizer = spec["model"], spec.get("normalizer")
    forms = [] if not normalizer else normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    forms = [form["type"] for form in forms]
    steps = flat_steps(spec.get("pre_tokenizer"))
    kinds = [step["type"] for step in steps]
    problems = [
        (model.get("type", "BPE") != "BPE", f"model {model.get('type')}"),
        (model.get("byte_fallback"), "byte_fallback (a SentencePiece model)"),
        (model.get("dropout"), "dropout"),
        (model.get("continuing_subword_prefix"), "continuing_subword_prefix"),
        (model.get("end_of_word_suffix"), "end_of_word_suffix"),
        (set(forms) - {"NFC"}, f"normalizer {forms}"),
        (kinds.count("ByteLevel") != 1 or set(kinds) - {"Split", "Digits", "Punctuation", "ByteLevel"},
         f"pre_tokenizer {kinds}"),
        (any(step.get("add_prefix_space") for step in steps), "add_prefix_space"),
        ((spec.get("decoder") or {}).get("type", "ByteLevel") != "ByteLevel", "a decoder other than ByteLevel")]
    found = [name for wrong, name in problems if wrong]
    if found:
        raise NotByteLevel(f"cannot represent {', '.join(found)}")
    try:
        pattern = one_pattern(steps, gpt2_pattern)
        words = None if pattern else split_by_steps(steps, gpt2_pattern, spell, unspell)
    except Exception as error:                                     # regex.error, or a behavior that drops text
        raise NotByteLevel(f"cannot represent {error}") from None
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    added = all_added(spec, config)
    made = {a + b for a, b in merges}
    if any(token.get("single_word") and token["content"] in made for token in added):
        raise NotByteLevel("cannot represent a single_word token that merges make too")
    arranged = arrange_tokens(vocabulary(spec) | {token["content"]: token["id"] for token in added}, merges,
                              [token["content"] for token in added])
    if len([token for token in arranged["tokens"] if len(token) == 1]) < 256 and model.get("unk_token"):
        raise NotByteLevel("cannot represent unk_token with a vocabulary that lacks bytes")
    specials = {token["content"]: token["id"] for token in added if token.get("special")}
    before, after = ids_around(spec, config, added)
    return arranged | dict(specials=specials, pattern=pattern or "", steps=() if pattern else steps, words=words,
                           ignore_merges=bool(model.get("ignore_merges")), nfc=bool(forms), added_tokens=added,
                           before=before, after=after, config=config)


def arrange_tokens(vocab, merges, added):
    """tokens and merges of bpe.Tokenizer from a vocabulary {spelling: id} and merges of spellings."""
    names = set(added)
    try:
        ids = {unspell(token): i for token, i in vocab.items() if token not in names}
    except UnicodeEncodeError as error:
        raise NotByteLevel(f"cannot represent the token {error.object!r}, which spells no bytes") from None
    # A merge that makes a special token is dropped: ordinary text must never become one.
    merges = [(unspell(a), unspell(b)) for a, b in merges if not {a, b, a + b} & names]
    if unknown := {part for a, b in merges for part in (a, b, a + b)} - set(ids):
        raise ValueError(f"a merge names or makes {spell(min(unknown))!r}, which is not in the vocabulary")
    singles = sorted((t for t in ids if len(t) == 1), key=ids.get)
    # Llama 3 lists a token once for every pair that makes it. These merges must be neighbours, or the token would
    # have two ranks.
    joined = [a + b for a, b in merges]
    distinct = list(dict.fromkeys(joined))
    groups = sum(x != y for x, y in zip(joined, joined[1:])) + (len(joined) > 0)
    if groups > len(distinct):
        raise NotByteLevel("cannot represent merges of different rank that make the same token")
    tokens = {token: ids[token] for token in chain(singles, distinct)}
    tokens |= dict(sorted(ids.items(), key=lambda item: item[1]))  # tokens that no merge makes come last
    return dict(tokens=tokens, merges=merges)
