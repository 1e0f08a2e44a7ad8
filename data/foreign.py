"""
Every tokenizer that is not byte-level BPE (SentencePiece, Unigram, WordPiece, ...), run by Hugging Face's `tokenizers`
library behind the interface of bpe.Tokenizer. The library is imported when the first such tokenizer is loaded.

Special tokens are ordinary text unless they are allowed. The model that the library gets therefore cannot make their
ids out of text: merges that end in a special token are dropped, and in the vocabulary its text stands under a name that
nobody can type. Ids equal those of transformers with add_special_tokens=False.
"""
import hashlib
import json
import os
import re
import secrets
from functools import cached_property

from data.tokenizer_files import all_added, ids_around, named_ids, post_processor, unspell, vocabulary, write_files
from data.words import to_bytes

BYTE = re.compile(r"<0x([0-9A-F]{2})>")                            # how SentencePiece spells a token of one byte


class ForeignTokenizer:
    """spec, config: the contents of tokenizer.json and tokenizer_config.json. why: what bpe.Tokenizer cannot represent.

    The attributes and methods are those of bpe.Tokenizer. ValueError: the library cannot run it either.
    """
    pattern, steps, merges, nfc = "", (), (), False

    def __init__(self, spec, config, why=""):
        self.spec, self.chat_config, self.chat_template = spec, dict(config), config.get("chat_template")
        if spec["model"].get("dropout"):
            raise ValueError("dropout in the model would give other ids every time; remove it from the file")
        self.added_tokens = all_added(spec, config)
        self.before, self.after = ids_around(spec, config, self.added_tokens)
        self.names = {i: text for text, i in vocabulary(spec).items()}
        self.names |= {token["id"]: token["content"] for token in self.added_tokens}
        if not self.names:
            raise ValueError("its vocabulary is empty")
        self.specials = {token["content"]: token["id"] for token in self.added_tokens if token["special"]}
        self.added = {token["content"]: token["id"] for token in self.added_tokens if not token["special"]}
        self.vocab_size = max(self.names) + 1
        self.bos_id, self.eos_id, self.unk_id, self.pad_id = named_ids(self.specials, config)
        if self.unk_id is None:
            unknown = spec["model"].get("unk_token")
            self.unk_id = next((i for i, name in self.names.items() if name == unknown), spec["model"].get("unk_id"))
        self.im_end_id = self.specials.get("<|im_end|>")
        self.backends, self.why = {}, why
        self.decoder = self.backend(frozenset())[0].decoder

    def backend(self, allowed):
        """(tokenizers.Tokenizer that finds only these special tokens, {its ids: ours} of added tokens)."""
        if allowed in self.backends:
            return self.backends[allowed]
        import tokenizers
        spec = self.spec | dict(truncation=None, padding=None, post_processor=None, version="1.0")
        spec["model"] = self.model_without_specials()
        # encode_special_tokens makes the library read "special" as "not to be found"
        spec["added_tokens"] = [token | {"special": token["special"] and token["content"] not in allowed}
                                for token in self.added_tokens]
        for key in ("normalizer", "pre_tokenizer", "decoder"):
            spec.setdefault(key, None)
        try:
            library = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:                             # plain Exception, or a panic, which is no Exception
            why = f"bpe.Tokenizer {self.why}; " if self.why else ""
            raise ValueError(f"{why}the tokenizers library says: {error}") from None
        library.encode_special_tokens = True
        found = {library.token_to_id(token["content"]): token["id"] for token in self.added_tokens}
        ours = {theirs: i for theirs, i in found.items() if theirs != i}
        if len(self.backends) >= 4:                               # a vocabulary of 250,000 tokens takes 100 MB
            self.backends.pop(next(iter(self.backends)))
        self.backends[allowed] = library, ours
        return self.backends[allowed]

    def model_without_specials(self):
        """The model with special tokens, and ids that the vocabulary leaves out, under names that no text contains.
        Added tokens that are not in the vocabulary get library ids above all others."""
        model, secret = dict(self.spec["model"]), secrets.token_hex(8)
        hidden = set(self.specials) - {model.get("unk_token")}
        if isinstance(model["vocab"], list):
            model["vocab"] = [[f"\U0010ffff{secret}{i}" if text in hidden else text, score]
                              for i, (text, score) in enumerate(model["vocab"])]
            return model
        names = {i: text for text, i in model["vocab"].items() if text not in hidden}
        size = max(model["vocab"].values(), default=-1) + 1
        model["vocab"] = {names.get(i) or f"\U0010ffff{secret}{i}": i for i in range(size)}
        if "merges" in model:
            pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
            prefix, specials = model.get("continuing_subword_prefix") or "", set(self.specials)
            if not all(b.startswith(prefix) for _, b in pairs):    # the library would end the process
                raise ValueError(f"a merge whose right part does not begin with {prefix!r}")
            model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b[len(prefix):]} & specials]
        return model

    # text -> ids

    def encode(self, text, allowed_special=()):
        """ids of a text. A special token is recognised only if its text is in allowed_special ("all": any of them).
        Otherwise it is ordinary text, so that users cannot inject special tokens. ValueError for a lone surrogate."""
        return self._encode(text, allowed_special)[0]

    def encode_offsets(self, text, allowed_special=(), literal=()):
        """ids, and for each the number of characters of `text` that are consumed after it, rounded up to whole ones.
        literal: positions at which the text of a special token is ordinary text all the same."""
        if literal:
            return self._encode_around(text, literal)
        ids, encoding = self._encode(text, allowed_special)
        ends, end = [], 0
        for _, after in encoding.offsets:
            end = max(end, after)
            ends.append(end)
        return ids, ends

    def _encode_around(self, text, literal):
        """encode_offsets with all special tokens but those at `literal`. Each part between two true special tokens is
        encoded after a special token, whose id is removed: alone it would begin a text, which can change its ids."""
        special = re.compile("|".join(map(re.escape, sorted(self.specials, key=len, reverse=True))))
        true = [found.span() for found in special.finditer(text) if found.start() not in literal]
        ids, ends, at = [], [], 0
        for start, stop in [*true, (len(text), len(text))]:
            part = text[at:start]
            aliens = {special.match(text, place)[0] for place in literal if at <= place < start
                      and special.match(text, place)}
            allowed = set(self.specials) - aliens
            anchor = next((name for name in sorted(allowed) if special.fullmatch(name)), "") if at else ""
            for words, before in ((part, anchor), (text[start:stop], "")):
                if words:
                    found, after = self.encode_offsets(before + words, allowed if words is part else "all")
                    skip = len(self.encode(before, "all")) if before else 0
                    ids += found[skip:]
                    ends += [at + end - len(before) for end in after[skip:]]
                at += len(words)
        return ids, ends

    def _encode(self, text, allowed_special):
        to_bytes(text)
        allowed = frozenset(self.specials if allowed_special == "all" else allowed_special)
        if unknown := allowed - set(self.specials):
            raise ValueError(f"allowed_special={sorted(unknown)}: not special tokens of this tokenizer")
        library, ours = self.backend(allowed)
        encoding = self.run(library.encode, text)
        return [ours.get(i, i) for i in encoding.ids] if ours else encoding.ids, encoding

    @staticmethod
    def run(encode, what):
        try:
            return encode(what, add_special_tokens=False)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:                             # no unk_token, or a panic, which is no Exception
            raise ValueError(f"the tokenizers library cannot encode this text: {error}") from None

    def encode_batch(self, texts):
        """encode of many texts, without special tokens, on all cores."""
        for text in texts:
            to_bytes(text)
        library, ours = self.backend(frozenset())
        found = [encoding.ids for encoding in self.run(library.encode_batch_fast, texts)]
        return [[ours.get(i, i) for i in ids] for ids in found] if ours else found

    def encode_readable(self, text):
        return self.encode(text)

    def prompt(self, text):
        """ids that a model continues: those the tokenizer puts before every text, then the text's."""
        return [*self.before, *self.encode(text)]

    # ids -> text

    def decode(self, ids):
        """Text of ids, as the library's decoder puts it together. Bytes that are not UTF-8 become U+FFFD."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        try:
            tokens = [self.names[i] for i in ids]
        except KeyError as error:
            raise ValueError(f"id {error.args[0]} is not in this vocabulary of {self.vocab_size}") from None
        return self.decoder.decode(tokens) if self.decoder else " ".join(tokens)

    def stream(self, before=()):
        """An object with push(id) -> the text that is complete by now, and flush() -> the rest. before: ids whose text
        is shown already. Without them the text begins here, and the space of a first "▁the" is no part of it."""
        return ForeignStream(self, before)

    @cached_property
    def bytes_of(self):
        """id -> bytes that the token stands for inside a text: "▁the" is b" the", <0x0A> is b"\\n"."""
        kinds = json.dumps(self.spec.get("decoder") or {})
        found = {}
        for i, text in self.names.items():
            byte = BYTE.fullmatch(text) if '"ByteFallback"' in kinds else None
            if text in self.specials or text in self.added:
                found[i] = text.encode("utf-8")
            elif byte:
                found[i] = bytes([int(byte[1], 16)])
            elif '"ByteLevel"' in kinds:
                try:
                    found[i] = unspell(text)
                except UnicodeEncodeError:
                    found[i] = text.encode("utf-8")
            else:
                shown = self.decoder.decode(["a", text]) if self.decoder else "a " + text
                found[i] = shown.removeprefix("a").encode("utf-8")
        return found

    @cached_property
    def tokens(self):
        """bytes -> id of the tokens that are neither special nor added. Of two with the same bytes, such as <0x20> and
        "▁", the one that is not a token of one byte."""
        left_out = {token["id"] for token in self.added_tokens}
        order = sorted((i for i in self.names if i not in left_out),
                       key=lambda i: (not BYTE.fullmatch(self.names[i]), -i))
        return {self.bytes_of[i]: i for i in order}

    # the formats that models are taught

    def special(self, name):
        if name not in self.specials:
            raise ValueError(f"this tokenizer has no {name}")
        return self.specials[name]

    def render(self, messages, add_generation_prompt=False, **variables):
        """Messages [{"role", "content"}] -> ids, mask by the chat template. mask is 1 on what the assistant writes."""
        from data import templates
        return templates.render(self, messages, add_generation_prompt, **variables)

    # files

    @cached_property
    def hash(self):
        """sha256 of everything that decides ids."""
        parts = [self.spec["model"], self.spec.get("normalizer"), self.spec.get("pre_tokenizer"),
                 sorted(self.added_tokens, key=lambda token: token["id"])]
        return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json as transformers reads them."""
        spec = self.spec | dict(version="1.0", truncation=None, padding=None, added_tokens=self.added_tokens,
                                post_processor=post_processor(self.before, self.after, self.names))
        write_files(folder, spec, self.chat_config, self.chat_template)


class ForeignStream:
    """Decodes the last tokens again with every new one, because a token's text can depend on those around it. Text is
    held back while it may still change: half a character, or a run of tokens of one byte, of which the library writes
    every byte as U+FFFD if the run is not UTF-8."""

    def __init__(self, tokenizer, before):
        self.tokenizer, self.ids = tokenizer, list(before)
        self.context, self.at = max(0, len(before) - 8), len(before)             # ids[context:at] are shown already
        while 0 < self.context < len(before) and BYTE.fullmatch(tokenizer.names[self.ids[self.context]]):
            self.context -= 1                                      # not inside a run of tokens of one byte
        self.shown = [tokenizer.decode(self.ids)]

    def push(self, i):
        self.tokenizer.decode([i])                                 # ValueError for an id that is none
        self.ids.append(i)
        if BYTE.fullmatch(self.tokenizer.names[i]):
            return ""
        before = self.tokenizer.decode(self.ids[self.context:self.at])
        text = self.tokenizer.decode(self.ids[self.context:])
        if text.endswith("\ufffd") or not text.startswith(before):
            return ""
        self.context, self.at = self.at, len(self.ids)
        self.shown.append(text[len(before):])
        return self.shown[-1]

    def flush(self):
        """The rest of decode(all ids)."""
        shown, whole = "".join(self.shown), self.tokenizer.decode(self.ids)
        self.shown = [whole]
        return whole[len(os.path.commonprefix([shown, whole])):]
