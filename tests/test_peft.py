"""Adapter folders against peft: its folders open here, ours open there, with equal logits; merging; what is refused and why."""
import copy
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune_lora as f
import model as m
from conftest import ROOT, Late, run
from data.templates import is_chat
from nanopath.hub import find_folder
from nanopath.peft import find_base, weights_hash
from test_model import BASE, FAMILIES, TOKENIZER, greedy

peft = Late("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:transformers reads the tokenizer of any Qwen2", "ignore::UserWarning:peft")
CLOSE, EXACT = 1e-5, 1e-12
CHOSEN = ["gpt2", "llama with biases", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "smollm3", "phi3",
          "phi3 with partial rotation", "gemma", "gemma2", "gemma3", "olmo2", "gpt_neo", "gpt_neox", "falcon 7b", "falcon 40b",
          "falcon rw", "bloom", "mpt"]


def base_of(family, folder):
    """A small model of transformers whose logits are of size one, saved in `folder`."""
    name, changes, _ = FAMILIES[family]
    kind = getattr(transformers, name)
    settings = {} if name == "GPT2Config" else dict(vocab_size=264) if name == "MptConfig" else dict(BASE)
    if not hasattr(kind(), "num_key_value_heads"):                 # peft would believe it
        settings.pop("num_key_value_heads", None)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(
        kind(**dict(bos_token_id=0, eos_token_id=0, pad_token_id=0) | settings | changes)).eval()
    for name, p in theirs.named_parameters():
        torch.nn.init.normal_(p, float(p.dim() == 1 and name.endswith("weight") and "Gemma" not in kind.__name__), 0.12)
    theirs.generation_config.eos_token_id = None
    theirs.save_pretrained(folder)
    TOKENIZER.save(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """family -> (a fresh copy of its model, its folder), made once."""
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp("base")
            made[family] = base_of(family, folder), folder
        return copy.deepcopy(made[family][0]), made[family][1]
    return get


def linears_of(theirs):
    """Names of the matrices in its blocks, without experts and routers."""
    return [name for name, module in theirs.named_modules() if isinstance(module, (torch.nn.Linear, transformers.Conv1D))
            and name.split(".")[-1] not in ("lm_head", "embed_out", "gate", "router") and ".experts" not in name]


def settings_of(method, theirs):
    names = linears_of(theirs)
    if method in ("prefix", "prompt"):
        kind = peft.PrefixTuningConfig if method == "prefix" else peft.PromptTuningConfig
        c, falcon = theirs.config, theirs.config.model_type == "falcon" and not theirs.config.new_decoder_architecture
        heads = dict(num_attention_heads=1, token_dim=8) if falcon and c.multi_query and method == "prefix" else {}
        return kind(num_virtual_tokens=5, task_type="CAUSAL_LM", **heads | (dict(num_attention_heads=4) if c.model_type == "mpt" else {}))
    if method == "ia3":
        after = [name for name in names if name.endswith(("down_proj", "mlp.c_proj", "dense_4h_to_h"))]
        keys = [name for name in names if name.endswith(("k_proj", "v_proj", "c_attn", "query_key_value", "qkv_proj", "Wqkv"))]
        return peft.IA3Config(target_modules=keys + after, feedforward_modules=after, task_type="CAUSAL_LM")
    return peft.LoraConfig(r=4, lora_alpha=6, target_modules=names, use_rslora=method == "rslora", use_dora=method == "dora",
                           rank_pattern={names[0]: 3, names[-1].split(".")[-1]: 2}, alpha_pattern={names[-1]: 5}, task_type="CAUSAL_LM")


def learnt(wrapped, scale=0.12):
    """As if it had been trained: no zeros, no ones."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "magnitude" in name or "ia3_l" in name or name.endswith(("magnitude", "factor")):
                p.mul_(1 + 0.3 * torch.randn_like(p))
            elif "lora_" in name or "prompt_encoder" in name or p.requires_grad:
                torch.nn.init.normal_(p, 0.0, 4 * scale if name.startswith("prefix") or "prompt" in name else scale)
    return wrapped.eval()


def wrap(theirs, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                            # fan_in_fan_out, layers it does not find
        return learnt(peft.get_peft_model(theirs, config))


def open_theirs(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, folder).eval()


@torch.no_grad()
def logits(model, ids):
    if isinstance(model, m.GPT):
        return model(ids)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1]:]


def apart(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "prefix", "prompt"])
@pytest.mark.parametrize("family", CHOSEN)
def test_adapters_of_peft_open_here_and_ours_there(family, method, bases, tmp_path):
    method = "rslora" if method == "lora" and CHOSEN.index(family) % 2 else method
    theirs, folder = bases(family)
    if family == "falcon 40b" and method == "prefix":              # a prefix of its own for each query head: see below
        pytest.skip("our heads share keys and values in groups")
    ids, plain = torch.randint(264, (2, 50)), logits(theirs, torch.arange(50)[None])
    wrapped = wrap(theirs, settings_of(method, theirs))
    wrapped.save_pretrained(tmp_path / "theirs")
    ours, tokenizer = m.load_model(tmp_path / "theirs", device="cpu")
    assert tokenizer.hash == TOKENIZER.hash
    want = logits(wrapped, ids)
    assert apart(logits(ours, ids), want) < CLOSE and apart(logits(ours, torch.arange(50)[None]), plain) > 0.1
    f.save_adapter(tmp_path / "ours", ours, folder, tokenizer)
    assert apart(logits(open_theirs(bases(family)[0], tmp_path / "ours"), ids), want) < CLOSE
    again, _ = m.load_model(tmp_path / "ours", device="cpu")
    assert torch.equal(logits(again, ids), logits(ours, ids)) or method == "prompt" and ours.config.embed_scale
    with torch.no_grad():                                          # our cache against theirs, past the end of a window
        options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, attention_mask=torch.ones(1, 20))
        generated = wrapped.generate(input_ids=ids[:1, :20], **options)[0, -6:].tolist()
        cache, new = m.KVCache(ours, 1, 40), []
        scores = ours(ids[:1, :20], cache=cache, last=True)
        for _ in range(6):
            new.append(int(scores.argmax()))
            scores = ours(torch.tensor([new[-1:]]), cache=cache, last=True)
        assert new == generated == greedy(ours, ids[:1, :20], 6)[0, 20:].tolist()
        assert apart(ours(ids, cache=None)[:, :20], ours(ids[:, :20])) < CLOSE


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "falcon 40b", "phi3 with partial rotation", "qwen3"])
@pytest.mark.parametrize("method, targets", [("lora", ("q_proj", "v_proj", "up_proj")), ("dora", ("k_proj", "down_proj")),
                                             ("ia3", ()), ("lora", ()), ("prefix", ()), ("prompt", ())])
def test_what_we_train_opens_in_peft(family, method, targets, bases, tmp_path):
    theirs, folder = bases(family)
    ours, _ = m.load_model(folder, device="cpu")
    f.add_adapters(ours, method, targets, rank=3, alpha=5.0, rslora=len(targets) == 3, virtual_tokens=5)
    ids = torch.randint(264, (2, 40))
    if method in ("lora", "dora"):
        assert apart(logits(ours, ids), logits(theirs, ids)) < CLOSE                     # nothing is learnt yet
    f.save_adapter(tmp_path, learnt(ours), folder)
    want = logits(ours, ids)
    assert apart(logits(open_theirs(theirs, tmp_path), ids), want) < CLOSE
    again, _ = m.load_model(tmp_path, device="cpu")
    assert apart(logits(again, ids), want) < 1e-6 and again.config == ours.config
    a, b = f.trained(ours), f.trained(again)                       # also the ranks: nothing grows when it is saved again
    assert {name: p.shape for name, p in a.items()} == {name: p.shape for name, p in b.items()}


def test_where_parts_of_a_matrix_have_no_adapter_the_folder_says_so(bases, tmp_path):
    ours, _ = m.load_model(bases("gpt2")[1], device="cpu")
    f.add_adapters(ours, "lora", ("k_proj",), rank=3, rslora=True)
    f.save_adapter(tmp_path, learnt(ours), bases("gpt2")[1])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"
    assert tensors[key].shape == (96, 3) and not tensors[key][:32].any() and tensors[key][32:64].all()
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == ["attn.c_attn"] and config["fan_in_fan_out"] and config["use_rslora"]
    tensors[key][0, 0] = 1.0                                       # then the file contradicts its metadata
    rewrite(tmp_path, tensors)
    with pytest.raises(ValueError, match="c_attn is not zero outside"):
        m.load_model(tmp_path, device="cpu")


def rewrite(folder, tensors, **metadata):
    from safetensors import safe_open
    with safe_open(folder / "adapter_model.safetensors", "pt") as opened:
        metadata = (opened.metadata() or {}) | metadata
    save_file(tensors, folder / "adapter_model.safetensors", metadata=metadata)


@pytest.mark.parametrize("targets", ["all-linear", r".*layers\.[01]\..*(q_proj|down_proj)", ["q_proj", "lm_head"]])
def test_targets_may_be_a_pattern_or_all_and_include_the_head(targets, bases, tmp_path):
    for family in ("llama with biases", "qwen2"):                  # qwen2: the head is the embedding
        wrapped = wrap(bases(family)[0], peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
        wrapped.save_pretrained(tmp_path / family)
        ours, _ = m.load_model(tmp_path / family, device="cpu")
        ids = torch.randint(264, (2, 30))
        assert apart(logits(ours, ids), logits(wrapped, ids)) < CLOSE


def test_biases_and_whole_modules_that_peft_trained_are_loaded(bases, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], bias="all", modules_to_save=["lm_head", "norm"],
                             task_type="CAUSAL_LM")
    wrapped = wrap(bases("llama with biases")[0], config)
    wrapped.save_pretrained(tmp_path / "theirs")
    ours, _ = m.load_model(tmp_path / "theirs", device="cpu")
    ids = torch.randint(264, (2, 30))
    assert apart(logits(ours, ids), logits(wrapped, ids)) < CLOSE
    with pytest.raises(ValueError, match="besides lora, .* was trained"):
        f.save_adapter(tmp_path / "ours", ours, bases("llama with biases")[1])
    wrapped = wrap(bases("qwen2")[0], peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"))
    wrapped.save_pretrained(tmp_path / "tied")
    ours, _ = m.load_model(tmp_path / "tied", device="cpu")
    assert apart(logits(ours, ids), logits(wrapped, ids)) < CLOSE and not ours.config.tie_embeddings


def test_a_projected_prefix_is_saved_as_what_it_becomes(bases, tmp_path):
    config = peft.PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=8, task_type="CAUSAL_LM")
    wrapped = wrap(bases("qwen3")[0], config)
    wrapped.save_pretrained(tmp_path)
    ids = torch.randint(264, (2, 30))
    assert apart(logits(m.load_model(tmp_path, device="cpu")[0], ids), logits(wrapped, ids)) < CLOSE


# ---- merging

@pytest.mark.parametrize("family", ["gpt2", "llama with biases", "phi3"])
@pytest.mark.parametrize("method", ["rslora", "dora", "ia3"])
def test_merged_is_what_peft_merges_and_unmerging_is_exact(family, method, bases, tmp_path):
    wrapped = wrap(bases(family)[0], settings_of(method, bases(family)[0]))
    wrapped.save_pretrained(tmp_path / "adapter")
    ours, tokenizer = m.load_model(tmp_path / "adapter", device="cpu")
    before, ids = {name: p.clone() for name, p in ours.named_parameters()}, torch.randint(264, (2, 30))
    want, found = logits(ours, ids), f.merge(ours)
    assert apart(logits(ours, ids), want) < CLOSE
    m.save_model(tmp_path / "merged", ours, tokenizer)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert apart(logits(opened, ids), want) < CLOSE
    wrapped.merge_and_unload().save_pretrained(tmp_path / "theirs")
    TOKENIZER.save(tmp_path / "theirs")
    theirs, _ = m.load_model(tmp_path / "theirs", device="cpu")
    for name, p in theirs.named_parameters():
        assert apart(p, ours.get_parameter(name)) < 1e-6, name
    f.unmerge(ours, found)
    after = dict(ours.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(ours, ids), want)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_merged_equals_unmerged_in_float64_also_where_the_head_is_the_embedding(method, bases, tmp_path):
    ours, _ = m.load_model(bases("qwen2")[1], device="cpu", dtype=torch.float64)
    assert ours.config.tie_embeddings
    learnt(f.add_adapters(ours, method, (*f.MATRICES, "lm_head"), rank=3, alpha=3.0)).double()
    f.save_adapter(tmp_path / "adapter", ours, bases("qwen2")[1])
    ids = torch.randint(264, (2, 30))
    want = logits(ours, ids)
    with pytest.warns(UserWarning, match="head shared its matrix with the embedding"):
        found = f.merge(ours)
    assert want.dtype == torch.float64 and apart(logits(ours, ids), want) < EXACT and not ours.config.tie_embeddings
    m.save_model(tmp_path / "merged", ours, TOKENIZER)
    assert not m.load_model(tmp_path / "merged", device="cpu")[0].config.tie_embeddings
    f.unmerge(ours, found)
    assert torch.equal(logits(ours, ids), want) and ours.config.tie_embeddings
    opened = open_theirs(bases("qwen2")[0], tmp_path / "adapter")
    assert apart(logits(opened, ids), want.float()) < CLOSE


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "prefix", "prompt", "adapter"])
def test_packing_switching_off_and_refusing_to_save(method, bases, tmp_path):
    ours, _ = m.load_model(bases("qwen2")[1], device="cpu")
    ids = torch.randint(264, (2, 30))
    plain, size = logits(ours, ids), ours.config.block_size
    learnt(f.add_adapters(ours, method, (*f.MATRICES, "lm_head"), rank=3, virtual_tokens=5))
    want = logits(ours, ids)
    with f.adapters_off(ours):
        assert torch.equal(logits(ours, ids), plain) and ours.config.block_size == size
    with pytest.raises(AssertionError, match="cannot be saved"):
        m.save_model(tmp_path / "model", ours, TOKENIZER)
    assert apart(want, plain) > 0.1 and apart(logits(ours.pack(), ids), want) < CLOSE


# ---- ours alone

@pytest.mark.parametrize("method", ["adapter", "bitfit"])
def test_methods_that_peft_does_not_know(method, bases, tmp_path):
    ours, _ = m.load_model(bases("gpt2")[1], device="cpu")
    f.add_adapters(ours, method, rank=3)
    f.save_adapter(tmp_path, learnt(ours), bases("gpt2")[1])
    ids = torch.randint(264, (2, 30))
    again, _ = m.load_model(tmp_path, device="cpu")
    assert torch.equal(logits(again, ids), logits(ours, ids))
    with pytest.raises((KeyError, ValueError, TypeError)):
        open_theirs(bases("gpt2")[0], tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = min(tensors)
    rewrite(tmp_path, tensors | {key: tensors[key][..., :-1].contiguous()})
    with pytest.raises(ValueError, match="does not fit|the model needs"):
        m.load_model(tmp_path, device="cpu")


def test_the_folder_knows_its_tokenizer_and_what_ends_an_answer(bases, tmp_path):
    ours, tokenizer = m.load_model(bases("qwen3")[1], device="cpu")
    assert not is_chat(tokenizer, ours.config.stop_ids)
    f.add_adapters(ours, "lora", rank=3)
    f.save_adapter(tmp_path / "a", ours, bases("qwen3")[1], tokenizer)
    ours.config = m.replace(ours.config, stop_token_ids=(tokenizer.im_end_id,))
    f.save_adapter(tmp_path / "b", ours, bases("qwen3")[1], tokenizer)
    for name, chats in (("a", False), ("b", True)):
        again, own = m.load_model(tmp_path / name, device="cpu")
        assert own.hash == tokenizer.hash and is_chat(own, again.config.stop_ids) == chats
    assert not any((tmp_path / "b").glob("*.tmp"))
    done = run(ROOT / "sample.py", f"--model={tmp_path / 'b'}", "--prompt=ab", "--max_new_tokens=4", "--device=cpu")
    assert "ab" in done.stdout


def test_the_newest_run_may_be_an_adapter(bases, tmp_path, monkeypatch, capsys):
    from nanopath.terminal import find_run
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bases("qwen3")[1], "out/base")
    ours, _ = m.load_model("out/base", device="cpu")
    f.save_adapter("out/tuned", f.add_adapters(ours, "lora", rank=3), "out/base")
    assert find_run("model", "") == find_run("model", "out/tuned") == "out/tuned"
    m.load_model("out/tuned", device="cpu", need_tokenizer=False)
    with pytest.raises(ValueError, match="holds a whole model"):
        f.save_adapter("out/base", ours, "out/base")


# ---- the base model

def test_the_base_is_found_by_path_and_hash(bases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, folder = bases("qwen3")[1], Path("runs/out/base")
    shutil.copytree(source, folder)
    ours, _ = m.load_model(folder, device="cpu")
    f.save_adapter("runs/out/tuned", f.add_adapters(ours, "lora", rank=3), folder)
    assert find_base(Path("runs/out/tuned")) == (folder, "")
    shutil.move("runs", "moved")                                   # all together: seen from the adapter it is where it was
    assert find_base(Path("moved/out/tuned"))[0].resolve() == Path("moved/out/base").resolve()
    other, _ = m.load_model("moved/out/base", device="cpu")
    torch.nn.init.normal_(other.norm.weight)
    m.save_model(folder, other, TOKENIZER)                         # another model in the old place: still the right one
    assert find_base(Path("moved/out/tuned"))[0].resolve() == Path("moved/out/base").resolve()
    shutil.rmtree("moved/out/base")
    with pytest.raises(ValueError) as refused:
        m.load_model("moved/out/tuned", device="cpu")
    for part in (weights_hash(source), weights_hash(folder), "moved/out/tuned", "runs/out/base", "train the adapter again"):
        assert part in str(refused.value).replace("\\", "/")
    assert "\n" not in str(refused.value)
    shutil.rmtree("runs")
    with pytest.raises(ValueError, match="its base model was not found: runs.*does not exist"):
        m.load_model("moved/out/tuned", device="cpu")


def test_several_shards_have_one_hash(bases, tmp_path):
    bases("qwen3")[0].save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    before = weights_hash(tmp_path)
    file = min(tmp_path.glob("model-*.safetensors"))
    save_file({key: t + 1 for key, t in load_file(file).items()}, file, metadata={"format": "pt"})
    assert len(before) == 64 and weights_hash(tmp_path) != before != weights_hash(bases("qwen3")[1])


def test_base_and_adapter_may_be_on_the_hub(bases, tmp_path, monkeypatch):
    ours, tokenizer = m.load_model(bases("qwen3")[1], device="cpu")
    f.add_adapters(ours, "lora", rank=3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    place = {name: tmp_path / f"hub/models--who--{name}/snapshots/{'a' * 40}" for name in ("base", "tuned")}
    for name in place:
        (tmp_path / f"hub/models--who--{name}/refs").mkdir(parents=True)
        (tmp_path / f"hub/models--who--{name}/refs/main").write_text("a" * 40, encoding="utf-8")
    shutil.copytree(bases("qwen3")[1], place["base"])
    f.save_adapter(place["tuned"], ours, "who/base", tokenizer)
    assert find_folder("who/tuned") == place["tuned"]
    again, _ = m.load_model("who/tuned", device="cpu")
    ids = torch.randint(264, (1, 20))
    assert torch.equal(logits(again, ids), logits(ours, ids))


# ---- what is refused

@pytest.fixture
def tuned(bases, tmp_path):
    ours, _ = m.load_model(bases("qwen3")[1], device="cpu")
    f.save_adapter(tmp_path, f.add_adapters(ours, "dora", ("q_proj", "down_proj"), rank=3), bases("qwen3")[1])
    return tmp_path


@pytest.mark.parametrize("change, message", [
    (dict(peft_type="LOHA"), "peft_type='LOHA' is not supported, only LORA, IA3"),
    (dict(peft_type="ADALORA"), "peft_type='ADALORA' is not supported"), (dict(peft_type=None), "peft_type=None"),
    (dict(task_type="SEQ_CLS"), "task_type='SEQ_CLS'"), (dict(lora_bias=True), "lora_bias=True is not supported"),
    (dict(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"), (dict(layer_replication=[[0, 2]]), "layer_replication"),
    (dict(target_parameters=["x"]), "target_parameters"), (dict(trainable_token_indices=[3]), "trainable_token_indices"),
    (dict(use_qalora=True), "use_qalora"), (dict(of_the_future={"a": 1}), "of_the_future"),
    (dict(init_lora_weights="pissa"), "init_lora_weights='pissa' is not supported: it changed the weights"),
    (dict(init_lora_weights="olora"), "olora"), (dict(r=4), r"has the shapes .* and r=4 need"), (dict(r=0), "r=0: must be a whole"),
    (dict(r="3"), "r='3'"), (dict(lora_alpha=None), "lora_alpha=None"), (dict(rank_pattern={"(": 3}), r"rank_pattern=.*\("),
    (dict(rank_pattern=[3]), "rank_pattern"), (dict(use_dora=False), "shapes"),
    (dict(base_model_name_or_path=None), "base_model_name_or_path=None"),
    (dict(base_model_name_or_path="nowhere/at/all"), "base model was not found: nowhere/at/all does not exist")])
def test_settings_that_we_do_not_compute_are_refused_by_name(change, message, tuned):
    file = tuned / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | change), encoding="utf-8")
    if "base_model_name_or_path" in change:
        rewrite(tuned, load_file(tuned / "adapter_model.safetensors"), base_place="")
    with pytest.raises(ValueError, match=message) as refused:
        m.load_model(tuned, device="cpu")
    assert "\n" not in str(refused.value) and str(tuned) in str(refused.value)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("change, message", [
    ({f"{Q}.lora_A.weight": torch.zeros(3, 31)}, "q_proj has the shapes"), ({f"{Q}.lora_B.weight": None}, "q_proj has the shapes"),
    ({f"{Q}.lora_magnitude_vector": torch.zeros(65)}, "magnitude"), ({f"{Q}.lora_A.weight": torch.zeros(3, 32, dtype=torch.int8)}, "int8"),
    ({f"{Q}s.lora_A.weight": torch.zeros(3, 32)}, "q_projs has an adapter, but .* There are q_proj k_proj"),
    ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(3, 264)}, "embed_tokens.lora_embedding_A"),
    ({"base_model.model.v_head.weight": torch.zeros(2, 32)}, "v_head.weight has the shape .* no such tensor"), ({"stray": torch.zeros(1)}, "stray: unknown tensor"),
    ({"base_model.model.lm_head.weight": torch.zeros(300, 32)}, r"lm_head.weight has the shape \(300, 32\)"),
    ({"base_model.model.model.layers.0.mlp.experts.0.up_proj.lora_A.weight": torch.zeros(3, 32)}, "experts.0.up_proj has an adapter")])
def test_tensors_that_do_not_fit_are_refused(change, message, tuned):
    tensors = {key: t for key, t in (load_file(tuned / "adapter_model.safetensors") | change).items() if t is not None}
    rewrite(tuned, tensors)
    with pytest.raises(ValueError, match=message) as refused:
        m.load_model(tuned, device="cpu")
    assert "\n" not in str(refused.value)


def test_damaged_and_unsafe_folders_are_refused(tuned, bases):
    file, config = tuned / "adapter_model.safetensors", tuned / "adapter_config.json"
    data, text = file.read_bytes(), config.read_text(encoding="utf-8")
    for parts in ("[1]", "{", '{"a": [-1]}', '{"a": 3}'):
        rewrite(tuned, load_file(file), parts=parts)
        with pytest.raises(ValueError, match="metadata is damaged"):
            m.load_model(tuned, device="cpu")
    rewrite(tuned, load_file(file), parts="{}", quantization="int3")
    with pytest.raises(ValueError, match="quantization='int3'"):
        m.load_model(tuned, device="cpu")
    file.write_bytes(data[:len(data) // 2])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        m.load_model(tuned, device="cpu")
    file.rename(tuned / "adapter_model.bin")
    with pytest.raises(ValueError, match="adapter_model.bin, a pickle, which is never opened"):
        m.load_model(tuned, device="cpu")
    (tuned / "adapter_model.bin").unlink()
    with pytest.raises(ValueError, match="has no adapter_model.safetensors: the folder is incomplete"):
        m.load_model(tuned, device="cpu")
    file.write_bytes(data)
    config.write_text(text[:50], encoding="utf-8")
    with pytest.raises(ValueError, match="adapter_config.json cannot be read"):
        m.load_model(tuned, device="cpu")
    config.write_text(text, encoding="utf-8")
    assert m.load_model(tuned, device="cpu")


def test_a_prefix_for_every_query_head_is_refused_where_heads_share_keys(bases, tmp_path):
    wrapped = wrap(bases("falcon 40b")[0], settings_of("prefix", bases("falcon 40b")[0]))
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="each of the 4 query heads has a prefix of its own"):
        m.load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_prefixes_of_another_size_are_refused(method, bases, tmp_path):
    ours, _ = m.load_model(bases("qwen3")[1], device="cpu")
    f.save_adapter(tmp_path, f.add_adapters(ours, method, virtual_tokens=5), bases("qwen3")[1])
    rewrite(tmp_path, {"prompt_embeddings": torch.zeros(5, 7)})
    with pytest.raises(ValueError, match=r"prompt_embeddings has the shape \(5, 7\); 5 virtual tokens of this model need \(5, "):
        m.load_model(tmp_path, device="cpu")
    rewrite(tmp_path, {"base_model.model.x": torch.zeros(5, 7)})
    with pytest.raises(ValueError, match="prompt_embeddings is missing"):
        m.load_model(tmp_path, device="cpu")
