"""
The encoder of labels.py: BERT from torch's layers, texts as it reads them, and the folders of others.

lessons/bert.py writes the same network out by hand; it uses only the first part of this file, from words to batches.
"""
import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from bpe import Tokenizer
from data import tinyworld as tw

# ---- from words to batches

WORD = re.compile(r"\w+|[^\w\s]")


class Row(NamedTuple):
    ids: list                   # [CLS] first [SEP] second [SEP]
    words: list                 # number of the word that a token is a piece of; -1: none
    types: list                 # 0 in the first segment, 1 in the second
    target: object = 0          # a label, a label per token, or (start, end)


def pack(tokenizer, *segments, target=0):
    """One or two lists of words -> Row."""
    row = Row([tokenizer.before[0]], [-1], [0], target)
    for number, words in enumerate(segments):
        pieces = [tokenizer.encode(word) for word in words]
        row.ids.extend([*sum(pieces, []), tokenizer.after[-1]])
        row.words.extend([*(n for n, ids in enumerate(pieces) for _ in ids), -1])
        row.types.extend([number] * (len(row.ids) - len(row.types)))
    return row


def pad(rows, value):
    """Lists of different length -> (B, T) tensor, filled on the right: positions count from the left."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def batch_of(tokenizer, rows):
    """ids, words, types, and which tokens there are to see, (B, T) each."""
    parts = (pad([row[i] for row in rows], value) for i, value in enumerate((tokenizer.pad_id, -1, 0)))
    lengths = torch.tensor([len(row.ids) for row in rows])
    return *parts, torch.arange(lengths.max()) < lengths[:, None]


def small_tokenizer(folder, texts):
    """Write a vocab.txt and load it: the words of texts (lists of words) and all places, jobs, animals and colours.
    Names are made of pieces."""
    values = [value.lower() for values in tw.VALUES.values() for value in values]
    words = set(values).union(*texts) - {name.lower() for name in tw.ALL_NAMES}
    pieces = [*map(str.lower, tw.NAME_STARTS), *(f"##{end}" for end in tw.NAME_ENDS), *sorted(words)]
    folder.mkdir(parents=True, exist_ok=True)
    tokens = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces])                # each one once
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return Tokenizer.load(folder / "vocab.txt")


# ---- the network

class Encoder(nn.Module):
    """BERT from the layers of torch: lessons/bert.py writes them out by hand and shows that they are equal."""

    def __init__(self, vocab_size, n_embd=64, n_layer=1, n_head=4, n_hidden=128, block_size=64, n_type=2, labels=2):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.types = nn.Embedding(n_type, n_embd) if n_type else None                 # DistilBERT has no segments
        self.embed_norm, self.pool = nn.LayerNorm(n_embd, eps=1e-12), nn.Linear(n_embd, n_embd)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(n_embd, n_head, n_hidden, 0.0, F.gelu, 1e-12, True)
                                    for _ in range(n_layer))
        self.labels = nn.Linear(n_embd, labels)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.5 * n_embd ** -0.5)

    def hidden(self, ids, types, see):
        """ids, types (B, T), see (B, T): true but for padding -> (B, T, C)"""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        x = self.embed_norm(x + self.types(types) if self.types else x)
        for block in self.blocks:
            x = block(x, src_key_padding_mask=~see)
        return x

    def outputs(self, x, task, see):
        """(B, T, C) -> logits whose last axis is what the target counts: labels, tags, or positions."""
        if task == "label":                                        # from [CLS]
            return self.labels((torch.tanh if self.types else torch.relu)(self.pool(x[:, 0])))
        logits = self.labels(x)
        return logits if task == "tag" else logits.transpose(1, 2).masked_fill(~see[:, None], -1e9)     # (B, 2, T)


# ---- folders of others

RENAMED = r"""^(bert|distilbert|cls)\. -  gamma$ weight  beta$ bias  ^(encoder|transformer).layer blocks
    ^embeddings.word_embeddings tokens  ^embeddings.position_embeddings positions
    ^embeddings.token_type_embeddings types  ^embeddings.LayerNorm embed_norm
    attention.(self.)?(query|q_lin) self_attn.in_proj_0  attention.(self.)?(key|k_lin) self_attn.in_proj_1
    attention.(self.)?(value|v_lin) self_attn.in_proj_2  attention.(output.dense|out_lin) self_attn.out_proj
    attention.output.LayerNorm|sa_layer_norm norm1  output.LayerNorm|output_layer_norm norm2
    intermediate.dense|ffn.lin1 linear1  (?<=\d\.)output.dense|ffn.lin2 linear2
    ^(pooler.dense|pre_classifier) pool  ^(classifier|qa_outputs|seq_relationship) labels""".split()
SIZES = {"bert": "hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings "
                 "type_vocab_size", "distilbert": "dim n_layers n_heads hidden_dim max_position_embeddings"}


def load_folder(folder, labels=2):
    """A folder of BERT or DistilBERT -> Encoder, names of weights that it lacks (they stay random). A last layer with
    another number of labels is left out."""
    from safetensors.torch import load_file
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"--model={folder}: no {name}. Download one: hf download distilbert-base-uncased "
                             "config.json model.safetensors vocab.txt tokenizer_config.json --local-dir=distilbert")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind, activation = config.get("model_type"), config.get("hidden_act", config.get("activation"))
    if kind not in SIZES or activation != "gelu":
        raise ValueError(f"--model={folder}: model_type={kind}, activation={activation}; allowed are bert and "
                         "distilbert, with gelu")
    if config.get("layer_norm_eps", 1e-12) != 1e-12:
        raise ValueError(f"--model={folder}: layer_norm_eps={config['layer_norm_eps']}, allowed is 1e-12")
    sizes = [config[key] for key in SIZES[kind].split()] + [0] * (kind == "distilbert")
    model, found = Encoder(config["vocab_size"], *sizes, labels), {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for pattern, new in zip(RENAMED[::2], RENAMED[1::2]):
            name = re.sub(pattern, "" if new == "-" else new, name)
        if not name.startswith(("predictions", "vocab_", "embeddings.position_ids")):             # fills gaps
            found[name] = tensor
    for name in [name for name in found if "in_proj_0" in name]:   # torch keeps queries, keys and values in one matrix
        parts = [found.pop(name.replace("in_proj_0", f"in_proj_{i}")) for i in range(3)]
        found[name.replace("in_proj_0.", "in_proj_")] = torch.cat(parts)
    found = {name: tensor for name, tensor in found.items() if not name.startswith("labels") or len(tensor) == labels}
    missing, unknown = model.load_state_dict(found, strict=False)
    if unknown:
        raise ValueError(f"{folder}/model.safetensors: no place for {', '.join(unknown[:3])}")
    return model, missing
