"""
SentencePiece's tokenizer.model (Llama 2, Mistral, T5, ...) as the content of a tokenizer.json, for data/foreign.py.

The file is one protobuf message (sentencepiece_model.proto). Its wire format is read by hand: every field is a number
(field << 3 | kind), then a varint, 4 or 8 bytes, or a length and so many bytes. Nothing in it is ever executed.
Ids of text equal sentencepiece's with these exceptions, which transformers shares: a text that begins with a space gets
no second one; the library normalizes (charsmap) whole grapheme clusters; of two segmentations with the same score
Unigram may choose the other; with Unigram and byte fallback, the text <0x0A> is the byte.
Papers  SentencePiece (arXiv:1808.06226), Unigram language model (arXiv:1804.10959)
"""
import base64
import struct

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6      # types of pieces
MODEL_TYPES = {1: "unigram", 2: "bpe"}                                   # 3: words, 4: characters


def read_varint(data, at):
    """(number, position after it): seven bits per byte, the lowest first; the highest bit says that more follow."""
    value = shift = 0
    while at < len(data) and shift < 70:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at
    raise ValueError("it is cut short or damaged: a number has no end")


def read_fields(data):
    """Yield (field number, value) of one message: an int, or the bytes of a float, a string or a message."""
    at = 0
    while at < len(data):
        key, at = read_varint(data, at)
        wire, size = key & 7, {1: 8, 5: 4}.get(key & 7)
        if wire == 0:
            value, at = read_varint(data, at)
        else:
            if wire == 2:
                size, at = read_varint(data, at)
            if size is None or at + size > len(data) or key >> 3 == 0:
                raise ValueError(f"it is cut short or no SentencePiece model (byte {at} of {len(data)})")
            value, at = data[at:at + size], at + size
        yield key >> 3, value


def read_piece(data):
    """(text, score, type) of the message SentencePiece."""
    found = dict(read_fields(data))
    return found[1].decode("utf-8"), struct.unpack("<f", found.get(2, bytes(4)))[0], found.get(3, NORMAL)


def read_sentencepiece(data, legacy=False):
    """The bytes of a tokenizer.model -> (tokenizer.json as a dict, {"bos_token": ..., ...} for tokenizer_config.json).
    ValueError: the file is cut short, or it is no SentencePiece model, or of a kind that has no words (char)."""
    pieces, trainer, normalizer = [], {}, {}
    try:
        for field, value in read_fields(data):
            if field == 1:
                pieces.append(read_piece(value))
            elif field in (2, 3):
                (trainer if field == 2 else normalizer).update(read_fields(value))
        kind = trainer.get(3, 1)
        if not pieces or kind not in MODEL_TYPES:
            raise ValueError(f"{len(pieces)} pieces, model type {kind}: only unigram (1) and bpe (2) can be read")
        if trainer.get(24, 0):
            raise ValueError("treat_whitespace_as_suffix: only spaces at the start of words can be read")
        unk_id = next((i for i, (_, _, type) in enumerate(pieces) if type == UNKNOWN), None)
        spec = spec_from_pieces(
            pieces, MODEL_TYPES[kind], bool(trainer.get(35, 0)), bool(normalizer.get(3, 1)),
            normalizer.get(2, b""), bool(normalizer.get(4, 1)), unk_id, legacy)
    except (KeyError, TypeError, AttributeError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"it is damaged or no SentencePiece model ({type(error).__name__}: {error})") from None
    # of TrainerSpec: 40 to 43 are the ids of unk, bos, eos and pad, -1 where there is none
    names = {}
    for name, field, default in (("unk", 40, 0), ("bos", 41, 1), ("eos", 42, 2), ("pad", 43, -1)):
        i = trainer.get(field, default)
        if 0 <= i < len(pieces) and pieces[i][2] in (UNKNOWN, CONTROL):
            names[f"{name}_token"] = pieces[i][0]
    return spec, names


def spec_from_pieces(pieces, kind, byte_fallback=False, add_dummy_prefix=True, charsmap=b"",
                     remove_extra_whitespaces=False, unk_id=None, legacy=False):
    """Pieces [(text, score, type)] in the order of their ids -> a tokenizer.json as a dict.

    kind: "bpe" or "unigram". add_dummy_prefix: a text begins with "▁" (a space). legacy: so does every part of it
    after a special token, as in Llama 2's first release. charsmap: SentencePiece's compiled normalization.
    """
    if kind not in MODEL_TYPES.values():
        raise ValueError(f"kind={kind!r}: must be bpe or unigram")
    if len({text for text, _, _ in pieces}) < len(pieces):
        raise ValueError("two pieces have the same text")
    unk_id = next((i for i, (_, _, type) in enumerate(pieces) if type == UNKNOWN), None) if unk_id is None else unk_id
    added = [dict(id=i, content=text, single_word=False, lstrip=False, rstrip=False, normalized=False,
                  special=type != USER_DEFINED)
             for i, (text, _, type) in enumerate(pieces) if type in (CONTROL, USER_DEFINED, UNKNOWN)]
    if kind == "bpe":
        model = dict(type="BPE", dropout=None, unk_token=None if unk_id is None else pieces[unk_id][0],
                     continuing_subword_prefix=None, end_of_word_suffix=None, fuse_unk=True,
                     byte_fallback=byte_fallback, ignore_merges=False,
                     vocab={text: i for i, (text, _, _) in enumerate(pieces)}, merges=merges_of(pieces))
    else:
        model = dict(type="Unigram", unk_id=unk_id, byte_fallback=byte_fallback,
                     vocab=[[text, score] for text, score, _ in pieces])
    normalizers = []
    if charsmap:
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    if remove_extra_whitespaces:
        normalizers += [{"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""},
                        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]
    # "first" asks for position 0 of the text, which a stripped space has taken
    prefix = "never" if not add_dummy_prefix else "always" if legacy or remove_extra_whitespaces else "first"
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": prefix}
    decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
    decoders += [{"type": "ByteFallback"}] * byte_fallback + [{"type": "Fuse"}]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * add_dummy_prefix
    return dict(version="1.0", truncation=None, padding=None, added_tokens=added,
                normalizer={"type": "Sequence", "normalizers": normalizers} if normalizers else None,
                pre_tokenizer=metaspace | {"split": False}, post_processor=None,
                decoder={"type": "Sequence", "decoders": decoders}, model=model)


def merges_of(pieces):
    """The merges of a SentencePiece BPE, best first. It stores no merges: any two pieces whose concatenation is a piece
    may be joined, the piece with the highest score first."""
    ids = {text: i for i, (text, _, type) in enumerate(pieces) if type in (NORMAL, UNUSED)}
    merges = []
    for text, i in sorted(ids.items(), key=lambda item: (-pieces[item[1]][1], item[1])):
        ways = [(text[:at], text[at:]) for at in range(1, len(text)) if text[:at] in ids and text[at:] in ids]
        merges += sorted(ways, key=lambda way: (ids[way[0]], ids[way[1]]))
    return [list(way) for way in merges]
