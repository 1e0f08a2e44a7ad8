"""lessons/bert.py held against torch.nn and transformers: the block, ALBERT, the masks, XLNet's streams."""
import itertools
import json
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lessons import bert

WORDS = [["jova", "lives", "in", "kelby"], ["a"], ["mibran", "likes", "kelby", ".", "jova", "lives"]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return bert.small_tokenizer(tmp_path_factory.mktemp("words"), WORDS)

@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_block_is_torchs_encoder_layer(pre_norm):
    torch.manual_seed(0)
    block = bert.Block(bert.Shape(9, pre_norm=pre_norm))
    theirs = nn.TransformerEncoderLayer(64, 4, 128, 0.0, "gelu", 1e-12, True, pre_norm)
    for ours in (block.norm1, block.norm2):
        nn.init.normal_(ours.weight)
    heads = [block.query, block.key, block.value]
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(torch.cat([head.weight for head in heads]))
        theirs.self_attn.in_proj_bias.copy_(torch.cat([head.bias for head in heads]))
    for name, ours in dict(out=theirs.self_attn.out_proj, up=theirs.linear1, down=theirs.linear2, norm1=theirs.norm1,
                           norm2=theirs.norm2).items():
        ours.load_state_dict(getattr(block, name).state_dict())
    x, see = torch.randn(3, 7, 64), torch.arange(7)[None, None] < torch.tensor([7, 2, 5])[:, None, None]
    expected = theirs(x, src_key_padding_mask=~see[:, 0])
    assert torch.allclose(block(x, see)[see[:, 0]], expected[see[:, 0]], atol=1e-5)


RENAMED = {"embeddings.word_embeddings": "tokens", "embeddings.position_embeddings": "positions",
           "embeddings.token_type_embeddings": "types", "embeddings.LayerNorm": "embed_norm",
           "encoder.embedding_hidden_mapping_in": "widen", r"encoder.albert_layer_groups.0.albert_layers": "blocks",
           "encoder.layer": "blocks", "attention.(self.)?(query|key|value)": r"\2",
           "attention.(output.)?dense": "out", "attention.(output.)?LayerNorm": "norm1", "intermediate.dense": "up",
           r"(?<=\d.)ffn(?=[.])": "up", "ffn_output": "down", "full_layer_layer_norm|output.LayerNorm": "norm2",
           "output.dense": "down", "^pooler(.dense)?": "pool"}


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Albert"])
def test_the_encoder_and_its_switches_are_those_of_transformers(kind, tokenizer):
    import transformers as hf
    size = dict(vocab_size=tokenizer.vocab_size, max_position_embeddings=33 if kind == "Roberta" else 32,
                hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=48, type_vocab_size=2, pad_token_id=0,
                hidden_act="gelu", layer_norm_eps=1e-12)
    theirs = getattr(hf, kind + "Model")(getattr(hf, kind + "Config")(
        **size, **(dict(embedding_size=8) if kind == "Albert" else {}))).eval()
    torch.manual_seed(0)
    for weight in theirs.parameters():                             # not biases of 0 and scales of 1
        nn.init.normal_(weight, std=0.3)
    ours = bert.Encoder(bert.Shape(tokenizer.vocab_size, 24, 8 if kind == "Albert" else 24, 3, 3, kind == "Albert"))
    found = {}
    for name, weight in theirs.state_dict().items():
        for old, new in RENAMED.items():
            name = re.sub(old, new, name)
        first = kind == "Roberta" and name == "positions.weight"   # RoBERTa counts positions from pad_id + 1
        found[name] = weight[1:] if first else weight
    missing, unknown = ours.load_state_dict(found, strict=False)
    assert not unknown and all(name.startswith(("fill", "pair")) for name in missing)
    rows = [bert.pack(tokenizer, *WORDS[:2]), bert.pack(tokenizer, WORDS[1]), bert.pack(tokenizer, WORDS[2], WORDS[0])]
    ids, _, types, see = bert.batch_of(tokenizer, rows)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=see.long(), token_type_ids=types).last_hidden_state
        assert torch.allclose(ours.hidden(ids, types, see)[see], expected[see], atol=1e-4)


def test_the_heads_are_those_of_transformers(tokenizer):
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertPreTrainingHeads
    ours = bert.Encoder(bert.Shape(tokenizer.vocab_size))
    theirs = BertPreTrainingHeads(BertConfig(vocab_size=tokenizer.vocab_size, hidden_size=64))
    head = theirs.predictions
    nn.init.normal_(ours.fill_bias)
    with torch.no_grad():
        for mine, other in ((ours.fill_dense, head.transform.dense), (ours.fill_norm, head.transform.LayerNorm),
                            (ours.pair, theirs.seq_relationship)):
            other.load_state_dict(mine.state_dict())
        head.decoder.weight.copy_(ours.tokens.weight)
        head.decoder.bias.copy_(ours.fill_bias)
        x = torch.randn(2, 5, 64)
        logits, pair = theirs(x, torch.tanh(ours.pool(x[:, 0])))
        assert torch.allclose(ours.fill(x), logits, atol=1e-5) and torch.allclose(ours.belongs(x), pair, atol=1e-6)


# ---- masks and orders

@pytest.mark.parametrize("whole", [False, True])
def test_masks_are_those_of_the_collator(whole, tokenizer):
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast
    from tokenizers import Tokenizer as Library
    from tokenizers.processors import BertProcessing
    library = Library.from_str(json.dumps(tokenizer.spec | dict(version="1.0", post_processor=None)))
    library.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    library = PreTrainedTokenizerFast(tokenizer_object=library,
                                      unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
                                      mask_token="[MASK]")
    rows = [bert.pack(tokenizer, words) for words in WORDS * 40]
    ids, words, _, _ = bert.batch_of(tokenizer, rows)
    torch.manual_seed(3)
    ours = bert.mask_tokens(ids, words, 4, tokenizer.vocab_size, whole, masked=1.0 if whole else 0.8,
                            randomized=0.0 if whole else 0.1)
    collator = DataCollatorForLanguageModeling(library, whole_word_mask=whole, mask_replace_prob=1 if whole else 0.8,
                                               random_replace_prob=0 if whole else 0.1)
    texts = library([" ".join(words) for words in WORDS * 40], padding=True, return_tensors="pt",
                    return_special_tokens_mask=True, return_offsets_mapping=True)
    torch.manual_seed(3)
    inputs, targets = collator.torch_mask_tokens(texts.input_ids.clone(), texts.special_tokens_mask,
                                                 texts.offset_mapping)
    assert ours[0].equal(inputs) and ours[1].equal(targets) and (targets >= 0).sum() > 50


def test_masking_rates_are_within_binomial_bounds():
    ids = torch.randint(5, 1000, (300, 200))
    torch.manual_seed(0)
    inputs, targets = bert.mask_tokens(ids, torch.arange(200).expand(300, -1), 4, 1000)
    chosen = targets >= 0
    for count, among, share in ((chosen.sum(), ids.numel(), 0.15), ((inputs == 4).sum(), chosen.sum(), 0.8),
                                (((inputs != ids) & (inputs != 4)).sum(), chosen.sum(), 0.1 * 0.999)):
        assert abs(count - among * share) < 4 * (among * share * (1 - share)) ** 0.5
    assert inputs[~chosen].equal(ids[~chosen]) and targets[chosen].equal(ids[chosen])


def test_no_token_of_xlnet_sees_itself_or_a_later_one():
    torch.manual_seed(0)
    model = bert.Encoder(bert.Shape(9, n_layer=3)).double()
    ids, types = torch.randint(5, 9, (1, 6)), torch.zeros(1, 6, dtype=torch.long)
    order = torch.tensor([[-1.0, 0.7, 0.2, 0.9, 0.4, -1.0]])
    for token, other in itertools.product(range(1, 5), range(6)):
        changed = ids.clone()
        changed[0, other] = 5 + (ids[0, other] - 4) % 4
        before, after = (model.second_stream(x, types, order, 4)[0, token] for x in (ids, changed))
        same = torch.equal(before, after)
        assert same == (other == token or order[0, other] > order[0, token]), (token, other)
    leaky = model.second_stream(ids, types, order, 4, leak=True)
    changed = ids.clone()
    changed[0, 1] = 5 + (ids[0, 1] - 4) % 4
    assert not torch.equal(leaky[0, 1], model.second_stream(changed, types, order, 4, leak=True)[0, 1])


def test_the_probabilities_of_all_texts_in_any_order_add_up_to_one():
    """p(x) = prod p(x_i | what is earlier in the order) is a distribution only if nothing leaks: 3 tokens of 4."""
    torch.manual_seed(0)
    model = bert.Encoder(bert.Shape(4, n_embd=8, word_embd=8, n_head=2)).double()
    nn.init.normal_(model.tokens.weight)
    ids = torch.tensor([[0, *text] for text in itertools.product(range(4), repeat=3)])
    for order in itertools.permutations(range(3)):
        places = torch.tensor([-1.0, *order]).expand(len(ids), -1)
        logprobs = model.fill(model.second_stream(ids, torch.zeros_like(ids), places, 1)).log_softmax(-1)
        total = logprobs.gather(-1, ids[..., None])[:, 1:].sum((1, 2)).exp().sum()
        assert total.item() == pytest.approx(1, abs=1e-9)


def test_the_second_stream_is_attention_of_torch():
    torch.manual_seed(0)
    block = bert.Block(bert.Shape(9)).double()
    theirs = nn.MultiheadAttention(64, 4, batch_first=True, dtype=torch.double)
    heads = [block.query, block.key, block.value]
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([head.weight for head in heads]))
        theirs.in_proj_bias.copy_(torch.cat([head.bias for head in heads]))
    theirs.out_proj.load_state_dict(block.out.state_dict())
    x, memory, see = torch.randn(1, 5, 64).double(), torch.randn(1, 5, 64).double(), torch.rand(5, 5) > 0.3
    see[:, 0] = True
    y = F.layer_norm(x + theirs(x, memory, memory, attn_mask=~see)[0], (64,), eps=1e-12)
    expected = F.layer_norm(y + block.down(F.gelu(block.up(y))), (64,), eps=1e-12)
    assert torch.allclose(block(x, see[None], memory), expected)
