"""nanopath/gguf_writer.py against gguf's own reader and quantization, a copy of llama.cpp's converter (test_gguf.py), a file that
llama.cpp's converter has made, and llama.cpp itself where llama_cpp can be imported (pip install llama-cpp-python)."""
import ctypes
import re
import warnings

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

import bpe
import model as m
from bpe import Tokenizer
from conftest import real_folder
from nanopath.gguf import read_gguf
from nanopath.gguf_writer import write_gguf
from quantize import NF4Linear, QuantLinear
from test_gguf import FAMILIES, converted, random_model, real_texts

try:
    import llama_cpp
except (ImportError, OSError, RuntimeError):
    llama_cpp = None
needs_llama_cpp = pytest.mark.skipif(llama_cpp is None, reason="pip install llama-cpp-python")
ACROSS = r"(?s:.{1,60})"                                           # merges learnt with it cross the words of every pattern


def learnt(pattern, size=700, specials=bpe.SPECIALS, **more):
    """A tokenizer whose ids change wherever a text is split at another place than by its pattern."""
    t = Tokenizer.train([text.replace("<|", "< |") for text in real_texts(150) * 2], size, ACROSS, specials=specials)
    return Tokenizer(t.tokens, t.specials, bpe.PATTERNS.get(pattern, pattern), t.merges, **more)


def tiny(tokenizer, **config):
    config = dict(vocab_size=tokenizer.vocab_size + 3, n_layer=2, n_embd=64, n_head=2, n_kv_head=1, head_dim=32, n_hidden=96, block_size=512,
                  eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id) | config
    model = m.GPT(m.GPTConfig(**config)).init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, p in model.named_parameters():                   # logits far apart, so that rounding chooses no other id
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * (0.1 if p.dim() == 1 else 0.2))
    return model.eval()


BYTES = Tokenizer.train("", 264)


def family_model(name, tmp_path, monkeypatch):
    """(folder of transformers, its config, our model) with 300 ids."""
    arch, kind, values = FAMILIES[name]
    if name == "phi3":                                             # with whole heads rotated it is a Mistral
        values = values | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5))
    monkeypatch.setitem(FAMILIES, name, (arch, kind, values | dict(vocab_size=300)))
    theirs = random_model(name)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(p.half())
    theirs.save_pretrained(tmp_path / "theirs")
    return arch, theirs.config, m.load_model(tmp_path / "theirs", device="cpu", need_tokenizer=False)[0]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:llama.cpp ignores the sliding window of phi3")
def test_tensors_equal_those_of_the_converter(name, tmp_path, monkeypatch):
    arch, config, ours = family_model(name, tmp_path, monkeypatch)
    expected, path = converted(tmp_path / "theirs", arch, config), tmp_path / "x.gguf"
    for kind in ("F16", "Q8_0", "Q4_0"):
        write_gguf(path, ours, BYTES, kind)
        assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["x.gguf"]
        reader = gguf.GGUFReader(path)
        found = {t.name: t for t in reader.tensors}
        assert found.keys() - {"rope_freqs.weight"} == expected.keys()
        for key, array in expected.items():
            exact = array.ndim == 1 or "ffn_gate_inp" in key or key == "position_embd.weight"
            head = kind == "Q4_0" and key == ("output.weight" if "output.weight" in expected else "token_embd.weight")
            assert found[key].tensor_type == (Type.F32 if exact else Type.Q8_0 if head else Type[kind]), key
            assert found[key].shape.tolist() == list(array.shape[::-1])
            np.testing.assert_array_equal(found[key].data, gguf.quantize(array, found[key].tensor_type).reshape(found[key].data.shape))
        assert reader.get_field("general.file_type").contents() == {"F16": 1, "Q8_0": 7, "Q4_0": 2}[kind]
        again, tokenizer = m.load_model(path, device="cpu")
        if kind == "F16":
            assert (again.config.block_size, again.config.stop_ids, tokenizer.vocab_size) == (ours.config.block_size, {2}, 264)
            ids = torch.randint(3, 256, (2, 40), generator=torch.Generator().manual_seed(1))
            torch.testing.assert_close(again(ids), ours(ids), rtol=1e-5, atol=1e-5)
            assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in ours.parameters())
            for (key, a), b in zip(again.named_parameters(), ours.parameters()):     # Gemma's norms are rounded by the 1
                torch.testing.assert_close(a, b, rtol=0, atol=2e-7 if "gemma" in name else 0, msg=key)


@needs_llama_cpp
@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_the_same_logits(name, tmp_path, monkeypatch):
    _, _, ours = family_model(name, tmp_path, monkeypatch)
    ids = torch.randint(3, 256, (1, 40), generator=torch.Generator().manual_seed(1))
    path = tmp_path / "x.gguf"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_gguf(path, ours, BYTES, "F16")
    theirs = llama(path)
    theirs.eval(ids[0].tolist())
    shown = slice(0, 16 if name == "phi3" else 40)                 # llama.cpp ignores the window of 16
    expected = ours(ids)[0, shown].detach().numpy()
    assert np.abs(theirs.scores[:40][shown] - expected).max() < 0.02 * np.abs(expected).max()
    assert (theirs.scores[:40][shown].argmax(1) == expected.argmax(1)).mean() > 0.9


def llama(path, n_ctx=512):
    return llama_cpp.Llama(str(path), n_ctx=n_ctx, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0)


# ---- tokenizers

def check_ids(path, tokenizer, count=300):
    """Ids of our reader and, where it is there, of llama.cpp, for texts with and without special tokens."""
    again = Tokenizer.load(path)
    theirs = llama_cpp and llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in real_texts(count):
        for allowed in ((), "all"):
            ids = tokenizer.encode(text, allowed_special=allowed)
            assert again.encode(text, allowed_special=allowed) == ids, text
            if theirs and not (hasattr(tokenizer, "spec") and text.startswith(" ")):     # test_gguf.py: no second space there
                assert theirs.tokenize(text.encode("utf-8"), add_bos=False, special=allowed == "all") == ids, text
    return again


@pytest.mark.parametrize("pattern, nfc, pre", [("gpt2", False, "gpt-2"), ("gpt4", False, "dbrx"), ("llama3", False, "dbrx"),
                                               ("qwen2", False, "stablelm2")])
def test_learnt_tokenizers(pattern, nfc, pre, tmp_path):
    tokenizer, path = learnt(pattern), tmp_path / "x.gguf"
    write_gguf(path, tiny(tokenizer), tokenizer)
    fields = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
    assert fields["tokenizer.ggml.pre"] == pre
    again = check_ids(path, tokenizer)
    assert (again.tokens, again.merges, again.specials) == (tokenizer.tokens, tokenizer.merges, tokenizer.specials)
    assert (again.eos_id, again.pad_id, again.bos_id, again.before, again.after) == (tokenizer.eos_id, tokenizer.pad_id, None, [], [])
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == tokenizer.vocab_size + 3 and tokens[-1] == f"[PAD{tokenizer.vocab_size + 2}]" and kinds[-3:] == [5] * 3
    assert [tokens[i] for i, kind in enumerate(kinds) if kind == 3] == list(bpe.SPECIALS)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert again.render(messages)[0] == tokenizer.render(messages)[0] and "generation %" not in again.chat_template
    if pattern != "gpt2":                                          # the words of gpt2 would be others: the check can fail
        other = Tokenizer(tokenizer.tokens, tokenizer.specials, bpe.PATTERNS["gpt2"], tokenizer.merges)
        assert any(other.encode(text) != tokenizer.encode(text) for text in real_texts(100))


def test_other_tokenizers(tmp_path):
    path = tmp_path / "x.gguf"
    write_gguf(path, tiny(BYTES), BYTES)                           # no merges at all
    again = check_ids(path, BYTES)
    assert again.merges == [] and again.tokens == BYTES.tokens
    with pytest.warns(UserWarning, match="o200k treats capitals outside of ASCII and combining marks differently"):
        write_gguf(path, tiny(t := learnt("o200k")), t)
    assert all(Tokenizer.load(path).encode(text) == t.encode(text) for text in real_texts(100))
    odd = learnt(r"\d|\D+")
    with pytest.raises(ValueError, match=r"no name for how this tokenizer splits texts \(pattern '\\\\d\|\\\\D\+'\)"):
        write_gguf(path, tiny(odd), odd)
    plain = learnt("gpt4")
    words = Tokenizer(plain.tokens | {b" zzz": 9000}, plain.specials, plain.pattern, plain.merges, ignore_merges=True)
    write_gguf(path, tiny(words, vocab_size=9001), words)          # a word that no merge makes, and ids without a token
    again = check_ids(path, words, 100)
    assert gguf.GGUFReader(path).get_field("tokenizer.ggml.pre").contents() == "llama-bpe"
    assert again.encode("a zzz")[-1] == 9000 and again.before == []
    bos = Tokenizer(plain.tokens, plain.specials, plain.pattern, plain.merges, before=[plain.specials["<|im_start|>"]])
    write_gguf(path, tiny(bos), bos)
    assert Tokenizer.load(path).before == bos.before and Tokenizer.load(path).bos_id == bos.before[0]


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_sentencepiece(version, tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes((real_folder("mistral") / f"tokenizer.model.{version}").read_bytes())
    tokenizer, path = Tokenizer.load(file), tmp_path / "x.gguf"
    write_gguf(path, tiny(tokenizer, n_embd=32, n_layer=1), tokenizer)
    again = check_ids(path, tokenizer, 100)
    assert again.spec["model"]["merges"] == tokenizer.spec["model"]["merges"] and again.specials == tokenizer.specials


# ---- real models

def greedy(model, ids, count):
    ids = torch.tensor([ids])
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    return ids[0].tolist()


def test_smollm2_equals_the_file_of_llama_cpps_converter(tmp_path):
    model, tokenizer = m.load_model(real_folder("smollm2"), device="cpu", dtype=torch.bfloat16)
    path = tmp_path / "x.gguf"
    write_gguf(path, model, tokenizer)
    found, expected = read_gguf(path).metadata, read_gguf(real_folder("smollm2.gguf")).metadata
    told = {key for key in expected if key.startswith("general.") and key != "general.architecture"}
    assert {key: found[key] for key in expected if key not in told | {"tokenizer.ggml.add_space_prefix"}} == {
        key: value for key, value in expected.items() if key not in told | {"tokenizer.ggml.add_space_prefix"}}
    again, same = m.load_model(path, device="cpu", dtype=torch.bfloat16)
    assert same.hash == tokenizer.hash and again.config == model.config
    for (key, a), b in zip(again.named_parameters(), model.parameters()):
        assert torch.equal(a, b), key


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_llama_cpp_continues_smollm2_with_the_same_ids(kind, tmp_path):
    model, tokenizer = m.load_model(real_folder("smollm2"), device="cpu", dtype=torch.bfloat16)
    path = tmp_path / "x.gguf"
    write_gguf(path, model, tokenizer, kind)
    ours, theirs = m.load_model(path, device="cpu")[0], llama(path, n_ctx=32)
    for prompt in ("The capital of France is", "def fibonacci(n):"):
        ids = theirs.tokenize(prompt.encode(), add_bos=False)
        count = len(ids)
        assert ids == tokenizer.encode(prompt)
        theirs.reset()
        for _ in range(12):
            theirs.eval(ids[theirs.n_tokens:])
            ids.append(int(theirs.scores[theirs.n_tokens - 1].argmax()))
        with torch.no_grad():
            logits = ours(torch.tensor([ids[:-1]]))[0, count - 1:]
        best = logits.topk(2).values
        # with Q8_0, llama.cpp rounds activations to 8 bits too: logits move by up to 1.2
        clear = best[:, 0] - best[:, 1] > (0 if kind == "F16" else 1.2)
        assert torch.equal(logits.argmax(-1)[clear], torch.tensor(ids[count:])[clear]) and clear.sum() >= 6


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_bytes_equal_those_of_llama_cpps_own_quantization(kind, tmp_path):
    model = tiny(BYTES, tie_embeddings=kind == "Q4_0").half().float()             # llama.cpp quantizes the F16 file
    for name in ("F16", kind):
        write_gguf(tmp_path / f"{name}.gguf", model, BYTES, name)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = {"Q8_0": 7, "Q4_0": 2}[kind], 1
    theirs = tmp_path / "theirs.gguf"
    assert llama_cpp.llama_model_quantize(*(str(path).encode() for path in (tmp_path / "F16.gguf", theirs)), ctypes.byref(options)) == 0
    ours, theirs = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in (tmp_path / f"{kind}.gguf", theirs))
    assert ours.keys() == theirs.keys()
    for name, t in ours.items():
        assert t.tensor_type == theirs[name].tensor_type and np.array_equal(t.data, theirs[name].data), name


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_llama_cpp_runs_a_model_that_was_made_here(kind, tmp_path):
    tokenizer, path = learnt("gpt4"), tmp_path / "x.gguf"
    write_gguf(path, tiny(tokenizer), tokenizer, kind)
    ours, theirs = m.load_model(path, device="cpu")[0], llama(path)
    ids = tokenizer.encode("Hello world, this is 2024.")
    wanted = greedy(ours, ids, 20)
    theirs.eval(wanted[:-1])
    found = theirs.scores[len(ids) - 1:len(wanted) - 1].argmax(1).tolist()
    same = np.mean(np.array(found) == wanted[len(ids):])
    assert same == 1 if kind == "F16" else same > 0.8


# ---- quantized models, and what is refused

def test_quantized_models_are_written_from_their_weights(tmp_path):
    model, path, expected = tiny(BYTES), tmp_path / "x.gguf", {}
    for block, name in ((model.layers[0].self_attn, "v_proj"), (model.layers[1].mlp, "down_proj"), (model.layers[1].mlp, "up_proj")):
        old = getattr(block, name)
        q = torch.randint(-127, 128, old.weight.shape, dtype=torch.int8)
        new = NF4Linear.quantize(old) if name == "up_proj" else QuantLinear(q, torch.rand(len(q), 1) / 500, bias=old.bias)
        setattr(block, name, new)
        expected[f"blk.{0 if name == 'v_proj' else 1}.{dict(v_proj='attn_v', down_proj='ffn_down', up_proj='ffn_up')[name]}.weight"] = new.weight
    for kind in ("F16", "Q8_0"):
        write_gguf(path, model, BYTES, kind)
        found = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
        for name, weight in expected.items():
            np.testing.assert_array_equal(found[name], gguf.quantize(weight.detach().numpy(), Type[kind]))


def test_rows_that_fit_no_block(tmp_path):
    write_gguf(tmp_path / "x.gguf", tiny(BYTES, n_embd=40, n_hidden=64), BYTES, "Q8_0")
    kinds = {t.name: t.tensor_type for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == Type.F16 and kinds["blk.0.ffn_down.weight"] == Type.Q8_0


def test_windows_and_patterns(tmp_path):
    with pytest.warns(UserWarning, match="architecture llama has no sliding window: the file has a context of 128 tokens"):
        write_gguf(tmp_path / "x.gguf", tiny(BYTES, qk_norm=False, window=128), BYTES)
    assert m.load_model(tmp_path / "x.gguf", device="cpu")[0].config.block_size == 128
    gemma = dict(norm_offset=True, embed_scale=True, norm_place="both", activation="gelu_tanh", tie_embeddings=True, n_layer=4, window=64,
                 window_layers=(0, 1, 3), rope_local_theta=1e4)
    write_gguf(tmp_path / "x.gguf", tiny(BYTES, **gemma), BYTES)
    assert m.load_model(tmp_path / "x.gguf", device="cpu")[0].config.window_layers == (0, 1, 3)
    with pytest.raises(ValueError, match="rope_layers=.* cannot be written: in GGUF's architecture gemma3 it is"):
        write_gguf(tmp_path / "x.gguf", tiny(BYTES, **gemma | dict(window_layers=(0, 2, 3))), BYTES)


REFUSED = {
    "family": (dict(activation="relu2", gated=False), "a model of the family nanopath has no GGUF architecture here; choose one of gemma, gemma2"),
    "biases": (dict(qkv_bias=True, o_bias=True), "o_bias=True cannot be written: in GGUF's architecture qwen3 it is False"),
    "dynamic": (dict(rope_scaling=dict(rope_type="dynamic", factor=2.0)), "rope_scaling='dynamic' cannot be written: in GGUF's architecture qwen3"),
    "attention factor": (dict(rope_scaling=dict(rope_type="yarn", factor=2.0, attention_factor=3.0, original_max_position_embeddings=256)),
                         "rope_scaling=.* cannot be written: GGUF's architecture qwen3 would have"),
    "classifier": (dict(labels=("a", "b")), "a classifier cannot be written"),
    "softcaps": (dict(norm_offset=True, embed_scale=True, norm_place="both", activation="gelu_tanh", tie_embeddings=True, qk_norm=False,
                      window=8, window_layers=(0,)), "attn_softcap=0.0, logit_softcap=0.0 cannot be written"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case, tmp_path):
    config, what = REFUSED[case]
    with pytest.raises(ValueError, match=what) as caught:
        write_gguf(tmp_path / "x.gguf", tiny(BYTES, **config), BYTES)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_bad_input(tmp_path):
    model, path = tiny(BYTES), tmp_path / "x.gguf"

    def refused(what, path=path, model=model, tokenizer=BYTES, **more):
        with pytest.raises(ValueError, match=what) as caught:
            write_gguf(path, model, tokenizer, **more)
        assert "\n" not in str(caught.value)
    refused("x.bin: the name of a GGUF file must end in .gguf", tmp_path / "x.bin")
    refused("kind='Q5': choose one of F16, Q8_0, Q4_0", kind="Q5")
    refused("load the model together with its tokenizer", tokenizer=None)
    refused("the tokenizer has 700 ids, the model's vocab_size is 267", tokenizer=learnt("gpt4"))
    (tmp_path / "file").write_text("", encoding="utf-8")
    refused(re.escape(str(tmp_path / "file" / "x.gguf")) + " cannot be written: ", tmp_path / "file" / "x.gguf")
    path.write_text("old", encoding="utf-8")
    for value, kind, what in ((1e5, "F16", "holds 100000.0: GGUF's F16 holds finite numbers up to 65504"),
                              (float("nan"), "Q8_0", "holds nan: GGUF's Q8_0 holds finite numbers; the file is damaged, or training diverged")):
        with torch.no_grad():
            model.layers[1].mlp.up_proj.weight[3, 5] = value
        refused("blk.1.ffn_up.weight " + what, kind=kind)
    assert path.read_text(encoding="utf-8") == "old" and sorted(file.name for file in tmp_path.iterdir()) == ["file", "x.gguf"]
    model.pack()
    if model.lm_head.packed is not None:
        refused("a packed model cannot be written: load it again")
