"""
How tokenizers are stored: Hugging Face's tokenizer.json and tokenizer_config.json, and GPT-2's vocab.bpe with
encoder.json. Reading gives the arguments of bpe.Tokenizer; a feature that it does not have is refused by name.
"""
import json
import os
from itertools import chain
from pathlib import Path

# Both formats write bytes as printable characters: a visible Latin-1 byte as itself, the others from U+0100 upward.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_ORDER = VISIBLE + [b for b in range(256) if b not in VISIBLE]  # bytes in the order of their characters
BYTE_TO_CHAR = {b: chr(b) if b in VISIBLE else chr(256 + i - len(VISIBLE)) for i, b in enumerate(BYTE_ORDER)}
CHAR_TO_BYTE = dict.fromkeys(range(256), 0xFFFF) | {ord(c): b for b, c in BYTE_TO_CHAR.items()}    # 0xFFFF: no byte


def spell(token):
    """Bytes of a token -> the printable characters that stand for them in the files: b" the" -> "Ġthe"."""
    return token.decode("latin-1").translate(BYTE_TO_CHAR)


def unspell(text):
    """The inverse of `spell`. UnicodeEncodeError: the text is not such a spelling."""
    return text.translate(CHAR_TO_BYTE).encode("latin-1")


def write_tokenizer(folder, tokenizer, chat_template):
    """Write tokenizer.json and tokenizer_config.json as transformers reads them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    added = [dict(id=i, content=name, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
             for name, i in sorted(tokenizer.specials.items(), key=lambda item: item[1])]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
    # The vocabulary contains the special tokens too: transformers ignores the ids of added_tokens when ids have gaps.
    model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                 fuse_unk=False, byte_fallback=False, ignore_merges=tokenizer.ignore_merges,
                 vocab={spell(token): i for token, i in tokenizer.tokens.items()} | tokenizer.specials,
                 merges=[[spell(a), spell(b)] for a, b in tokenizer.merges])
    data = dict(version="1.0", truncation=None, padding=None, added_tokens=added,
                normalizer={"type": "NFC"} if tokenizer.nfc else None,
                pre_tokenizer={"type": "Sequence", "pretokenizers": [split, byte_level]},
                post_processor=None, decoder=byte_level | {"use_regex": True}, model=model)
    # Without tokenizer_class, transformers 5 would use the split pattern of the model's family instead of ours.
    config = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False)
    for key, i in (("eos_token", tokenizer.eos_id), ("pad_token", tokenizer.pad_id)):
        config |= {key: tokenizer.bytes_of[i].decode("utf-8")} if i is not None else {}
    config |= {"chat_template": chat_template} if chat_template else {}
    for name, value in (("tokenizer.json", data), ("tokenizer_config.json", config)):
        temporary = folder / (name + ".tmp")
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", newline="\n")
        os.replace(temporary, folder / name)


def find_tokenizer(path):
    """The tokenizer file behind a path: the file itself, or tokenizer.json or vocab.bpe in a folder."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    names = ("tokenizer.json", "vocab.bpe") if path.is_dir() else (path.name,)
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{path}: no such tokenizer. Train one: python bpe.py PATH... --out=FOLDER")
    return file


def read_tokenizer(file, gpt2_pattern):
    """Arguments of bpe.Tokenizer from a file of find_tokenizer. gpt2_pattern: the split of files that name none."""
    if file.suffix == ".json" and file.name != "encoder.json":
        return read_tokenizer_json(file, gpt2_pattern)
    vocab = json.loads((file.parent / "encoder.json").read_text(encoding="utf-8"))
    lines = (file.parent / "vocab.bpe").read_text(encoding="utf-8").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    made = {a + b for a, b in merges}                              # the other tokens are bytes, and <|endoftext|>
    return arrange_tokens(vocab, merges, [t for t in vocab if len(t) > 1 and t not in made], gpt2_pattern)


def read_tokenizer_json(file, gpt2_pattern):
    """Arguments of bpe.Tokenizer from a tokenizer.json and the tokenizer_config.json beside it."""
    data = json.loads(file.read_text(encoding="utf-8"))
    model, normalizer, pre = data["model"], data.get("normalizer") or {}, data.get("pre_tokenizer") or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    split, level = steps[0], steps[-1]
    kinds = [step.get("type") for step in steps]
    added = data.get("added_tokens") or []
    problems = [
        (model.get("type", "BPE") != "BPE", f"model {model.get('type')}"),
        (model.get("byte_fallback"), "byte_fallback (a SentencePiece model)"),
        (model.get("dropout"), "dropout"),
        (model.get("continuing_subword_prefix"), "continuing_subword_prefix"),
        (model.get("end_of_word_suffix"), "end_of_word_suffix"),
        (normalizer.get("type", "NFC") != "NFC", f"normalizer {normalizer.get('type')}"),
        (kinds not in (["Split", "ByteLevel"], ["ByteLevel"]), f"pre_tokenizer {kinds}"),
        (level.get("add_prefix_space"), "add_prefix_space"),
        (level.get("use_regex", True) != (len(steps) == 1), f"pre_tokenizer {kinds} with use_regex {len(steps) > 1}"),
        (len(steps) > 1 and (split.get("behavior"), split.get("invert", False)) != ("Isolated", False),
         f"Split with behavior {split.get('behavior')}, invert {split.get('invert')}"),
        ((data.get("decoder") or {}).get("type", "ByteLevel") != "ByteLevel", "a decoder other than ByteLevel"),
        (any(t.get("lstrip") or t.get("rstrip") or t.get("single_word") for t in added),
         "added tokens that match the spaces around them (lstrip, rstrip, single_word)")]
    found = [name for wrong, name in problems if wrong]
    if found:
        raise ValueError(f"cannot represent {', '.join(found)}; only byte-level BPE (GPT-2, Llama 3, Qwen) can be read")
    pattern = gpt2_pattern if len(steps) == 1 else split["pattern"]["Regex"]
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    vocab = model["vocab"] | {token["content"]: token["id"] for token in added}
    beside = file.parent / "tokenizer_config.json"
    config = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    eos, pad = (config.get(key) for key in ("eos_token", "pad_token"))
    eos, pad = (token.get("content") if isinstance(token, dict) else token for token in (eos, pad))
    return arrange_tokens(vocab, merges, [token["content"] for token in added], pattern, eos=eos, pad=pad,
                          ignore_merges=bool(model.get("ignore_merges")), nfc=bool(normalizer))


def arrange_tokens(vocab, merges, specials, pattern, **rest):
    """Arguments of bpe.Tokenizer from a vocabulary {spelling: id} and merges of spellings."""
    names = set(specials)
    ids = {unspell(token): i for token, i in vocab.items() if token not in names}
    merges = [(unspell(a), unspell(b)) for a, b in merges]
    singles = sorted((t for t in ids if len(t) == 1), key=ids.get)
    if len(singles) < 256:
        raise ValueError(f"its vocabulary has {len(singles)} of the 256 bytes, so some text cannot be encoded")
    # Llama 3 lists a token once for every pair that makes it. These merges must be neighbours, or the token would
    # have two ranks.
    joined = [a + b for a, b in merges]
    distinct = list(dict.fromkeys(joined))
    groups = sum(x != y for x, y in zip(joined, joined[1:])) + (len(joined) > 0)
    if groups > len(distinct):
        raise ValueError("the same token is made by merges of different rank")
    tokens = {token: ids[token] for token in chain(singles, distinct)}
    tokens |= dict(sorted(ids.items(), key=lambda item: item[1]))  # tokens that no merge makes come last
    specials = {name: vocab[name] for name in specials}
    return dict(tokens=tokens, specials=specials, pattern=pattern, merges=merges, **rest)
