"""serve.py's engine: every text against sample.generate alone, the block pool, order, interruptions, errors, adapters."""
import itertools
import json
import math
import random
import shutil
import threading
import time

import pytest
import torch
from starlette.testclient import TestClient

import finetune_lora
import sample
import serve
from bpe import Tokenizer
from model import load_model, save_model
from nanopath import api, kernels
from nanopath.constrain import Constraint
from nanopath.limits import Settings
from nanopath.paged import Blocks
from quantize import quantize_model
from test_model import make, shrunk

TOKENIZER = Tokenizer.train([], 264)


def model_of(seed=1, context=96, **changes):
    return make(seed=seed, **changes | dict(eos_token_id=256, block_size=context)).eval().pack()


def work(engine, steps=10_000):
    while engine.step():
        steps -= 1
        assert steps, "the engine does not come to an end"


def solo(model, prompt, n, options):
    """What the engine must write, by sample.stream alone: ids, and (logprob, alternatives) of each."""
    found = list(sample.stream(model, [prompt], n, **dict(tokenizer=TOKENIZER) | options))
    return [item[1] for item in found], [item[2:] for item in found]


def idle(engine):
    """Nothing is left of any request."""
    assert not engine.rows and not len(engine.queue)
    assert engine.pool.users == [0] * engine.pool.count and engine.pool.available == engine.pool.count


def text(rng, low, high, V=256):
    return [rng.randrange(V) for _ in range(rng.randint(low, high))]


def mixed_options(rng, i):
    """One of every kind of option, with a seed of its own."""
    kinds = [dict(temperature=0), dict(temperature=0.7, top_k=20), dict(top_p=0.9), dict(min_p=0.05, temperature=1.3),
             dict(typical_p=0.8), dict(mirostat=3.0), dict(entropy_theta=0.5), dict(repetition_penalty=1.3, temperature=0),
             dict(frequency_penalty=0.7, presence_penalty=0.2), dict(no_repeat_ngram=2, temperature=0), dict(stop=("e", "xy")),
             dict(forbidden=(5, 7)), dict(alternatives=3), dict(stop_ids=range(0, 256, 16)),
             dict(constraint=Constraint.regex("[a-f]{3,9}( [0-9]+)?", TOKENIZER))]
    return kinds[i % len(kinds)] | dict(seed=rng.randrange(1000))


@pytest.mark.parametrize("slots,blocks", [(4, 0), (32, 0), (6, 8)])
def test_mixed_requests_are_their_solo_runs(slots, blocks):
    model, rng = model_of(), random.Random(slots)
    engine, got, asked = serve.Engine(model, TOKENIZER, slots, blocks, chunk=16), {}, []
    shared = text(rng, 50, 50)
    for i in range(30):
        prompt = shared[:rng.choice([16, 33, 50])] + text(rng, 1, 9) if i % 3 == 0 else text(rng, 1, 80)
        n, options = rng.randint(9, 40), mixed_options(rng, i)
        request = engine.submit(prompt, n, options, on_token=lambda r, item: got.setdefault(r.id, []).append(item))
        asked.append((request, n, options))
        for _ in range(rng.randint(0, 2)):                         # the others join later
            engine.step()
    work(engine)
    for request, n, options in asked:
        ids, values = solo(model, request.prompt, n, options)
        assert request.new == ids, (request.id, options)
        items = got[request.id]
        assert items.pop() is None and [item[0] for item in items] == ids
        for (_, logprob, alternatives), (expected, *tops) in zip(items, values):
            assert math.isclose(logprob, expected, abs_tol=2e-4)
            assert [i for i, _ in alternatives] == [i for i, _ in (tops[0] if tops else ())]
        assert request.finish_reason in ("stop", "length") and (request.finish_reason == "stop" or len(ids) == n)
    assert engine.stats()["prefix_hits"] > 3 and (engine.stats()["preemptions"] > 3) == bool(blocks)
    idle(engine)


@pytest.mark.parametrize("changes", [{}, dict(n_kv_head=2, n_head=4), shrunk("mistral-7b"), shrunk("gpt2"), shrunk("bloom-560m"),
                                     shrunk("gemma2-2b") | dict(head_dim=32), shrunk("mixtral-8x7b") | dict(n_hidden=64), shrunk("gemma3-1b"),
                                     dict(n_embd=768, n_layer=1, head_dim=64, n_hidden=1536)],
                         ids=["default", "grouped", "window", "learned", "alibi", "gemma2", "experts", "gemma3", "bfloat16"])
def test_logprobs_do_not_depend_on_the_neighbours_bit_for_bit(changes):
    model, rng = model_of(**changes), random.Random(0)
    if changes.get("n_embd") == 768:
        model = make(seed=1, **changes | dict(eos_token_id=256, block_size=96)).to(torch.bfloat16)
        model.dtype = torch.bfloat16
        if not kernels.can_pack(torch.device("cpu"), model.dtype):
            pytest.skip("this processor has no packed products in bfloat16")
        model.pack()
    count = 12 if model.dtype == torch.float32 else 45             # in bf16 more rows than one product may have
    asked = [(text(rng, 1, 70 if count == 12 else 30), rng.randint(3, 25 if count == 12 else 8), dict(seed=i, temperature=i % 2, stop_ids=()))
             for i in range(count)]

    def values(slots, order):
        engine, got = serve.Engine(model, TOKENIZER, slots, chunk=32), {}
        for i in order:
            engine.submit(*asked[i], on_token=lambda r, item, i=i: got.setdefault(i, []).append(item))
            if slots == 1:
                work(engine)
                engine.pool.__init__(engine.cache, engine.pool.count)          # no prefix of an earlier text
        work(engine)
        return got

    alone, together = values(1, range(count)), values(9 if count == 12 else 42, [*range(6, count), *range(6)])
    for i in range(count):
        assert alone[i] == together[i], [(a, b) for a, b in zip(alone[i], together[i]) if a != b][0]
    for i, (prompt, n, options) in enumerate(asked if model.dtype == torch.float32 else ()):
        assert [item[0] for item in alone[i][:-1]] == solo(model, prompt, n, options)[0]


def test_a_text_that_overflows_the_context_forgets_as_alone():
    model, T = model_of(), 96
    engine = serve.Engine(model, TOKENIZER, 3, chunk=32)
    rng = random.Random(3)
    asked = [(text(rng, n, n), T + 40, dict(seed=n, stop_ids=())) for n in (1, 15, 17, T - 1, T)]
    expected = {each[2]["seed"]: solo(model, *each)[0] for each in asked}
    for order in (asked, asked[::-1]):                             # a full row before others that are short, and after
        requests = [engine.submit(*each) for each in order]
        work(engine)
        for request, each in zip(requests, order):
            assert request.new == expected[each[2]["seed"]] and len(request.new) == T + 40
        idle(engine)
    with pytest.raises(ValueError, match=f"{T + 1} tokens.*at most {T}"):
        engine.submit(text(rng, T + 1, T + 1), 5)
    assert engine.submit([], 4, dict(temperature=0)).prompt == [256]
    with pytest.raises(ValueError, match="at least 1"):
        serve.Engine(model, None).submit([], 4)


@pytest.mark.parametrize("name,value", [("temprature", 1), ("cancelled", {1}), ("amateur", None), ("top_p", 7), ("stop", "x"), ("seed", "a"),
                                        ("stop_ids", [999])])
def test_bad_options_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        serve.Engine(model_of(), TOKENIZER).submit([1], 4, {name: value})


# ---- blocks

def test_blocks_against_a_slow_twin():
    """Random shares, takes and releases against lists: no block is lost, used twice, or found with another content."""
    for seed in range(30):
        rng, blocks, tables, content = random.Random(seed), Blocks(12, 4), [], {}
        for _ in range(400):
            if rng.random() < 0.55:
                ids = [rng.randrange(2) for _ in range(rng.randint(1, 20))]
                keys = blocks.keys(ids)
                assert keys == blocks.keys(ids, before=keys[:2]) and len(keys) == len(ids) // 4
                table = blocks.find(keys)
                for block, end in zip(table, itertools.count(4, 4)):
                    assert content[block] == ids[:end]
                    blocks.share(block)
                while len(table) < -(-len(ids) // 4) and (block := blocks.take()) is not None:
                    content[block] = None
                    table.append(block)
                for i, key in enumerate(keys[:len(table)]):
                    if blocks.key_of[table[i]] is None and blocks.publish(table[i], key):
                        content[table[i]] = ids[:4 * i + 4]
                tables.append(table)
            elif rng.random() < 0.02:
                blocks.clear()
            elif tables:
                blocks.release(tables.pop(rng.randrange(len(tables))))
            users = [sum(block in table for table in tables) for block in range(12)]
            assert blocks.users == users and blocks.available == users.count(0)
            assert sorted([*blocks.free, *blocks.unused]) == [b for b in range(12) if not users[b]]
            assert {blocks.key_of[b] for b in range(12)} - {None} == set(blocks.block_of)
    assert Blocks(1, 4).keys([1] * 4, "a") != Blocks(1, 4).keys([1] * 4, "b")


def poison(engine):
    """Overwrite what nobody may read: free blocks, and slots that no text has reached."""
    pool, cache = engine.pool, engine.cache
    for block in pool.free:
        pool.keys_of[block] = pool.values_of[block] = math.nan
    for row in range(engine.slots + 1):
        used = cache.n + (cache.lengths[row] if row < len(engine.rows) else 0)
        cache.k[:, row, :, used:] = cache.v[:, row, :, used:] = 1e4


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_shared_prefixes_freed_in_every_order(order):
    model, rng = model_of(), random.Random(1)
    prefix = text(rng, 40, 40)
    asked = [(prefix + text(rng, 3, 20), 12, dict(seed=i, stop_ids=())) for i in range(3)]
    expected = [solo(model, *each)[0] for each in asked]
    engine = serve.Engine(model, TOKENIZER, 3, 10, chunk=16)
    requests = [engine.submit(*each) for each in asked]
    for _ in range(6):
        engine.step()
        poison(engine)
    assert engine.stats()["blocks_shared"] == 2 and [r.cached_tokens for r in requests] == [0, 32, 32]
    for i in order[:2]:
        requests[i].cancel()
        engine.step()
        poison(engine)
    work(engine)
    assert requests[order[2]].new == expected[order[2]]
    idle(engine)
    requests = [engine.submit(*each) for each in asked]            # from what is left of the blocks
    while engine.step():
        poison(engine)
    assert [r.new for r in requests] == expected and min(r.cached_tokens for r in requests) >= 32


def test_the_pool_holds_what_the_slots_hold():
    model, rng = model_of(), random.Random(2)
    engine = serve.Engine(model, TOKENIZER, 5, 14, chunk=16)
    requests = [engine.submit(text(rng, 1, 60), 30, dict(seed=i, stop_ids=())) for i in range(12)]
    while engine.step():
        for request in engine.rows:
            assert request.published == engine.cache.lengths[request.slot] // 16 and engine.rows[request.slot] is request
            for i, block in enumerate(request.table[:request.published]):
                held = engine.pool.keys_of[block]
                if engine.pool.key_of[block] is not None:
                    assert torch.equal(held, engine.cache.k[:, request.slot, :, 16 * i:16 * i + 16])
    assert engine.stats()["preemptions"] and all(len(r.new) == 30 for r in requests)


def test_equal_prompts_are_read_once():
    model, prompt = model_of(), text(random.Random(5), 70, 70)
    engine = serve.Engine(model, TOKENIZER, 8, chunk=16)
    requests = [engine.submit(prompt, 8, dict(seed=3, stop_ids=()), index=i) for i in range(8)]
    work(engine)
    assert [r.new for r in requests] == sample.generate(model, [prompt] * 8, 8, seed=3, stop_ids=())
    assert engine.stats()["tokens_in"] == 70 + 7 * 6 and engine.stats()["prefix_tokens"] == 7 * 64


# ---- whose turn it is

def test_a_long_prompt_delays_short_ones_by_few_steps():
    model, rng = model_of(context=512), random.Random(0)
    engine, steps = serve.Engine(model, TOKENIZER, 8, chunk=16), 0
    engine.submit(text(rng, 500, 500), 5, dict(stop_ids=()))
    short = [engine.submit(text(rng, 5, 12), 5, dict(stop_ids=())) for _ in range(5)]
    while any(r.first_token_at is None for r in short):
        assert engine.step() and (steps := steps + 1) <= 1
    read = engine.cache.lengths[0]
    engine.step(), engine.step()
    assert engine.cache.lengths[0] - read == 16                    # in every second step while others write
    work(engine)
    assert engine.stats()["steps"] >= 500 // 16


def test_clients_take_turns():
    engine, started = serve.Engine(model_of(), TOKENIZER, 1), []
    note = lambda r, item: item is None and started.append(r.key)
    for key in "aaaaaabbc":
        engine.submit([1], 2, dict(stop_ids=()), on_token=note, key=key)
    assert [r.key for r in engine.queue] == list("abcabaaaa")
    work(engine)
    assert started == list("abcabaaaa")


def test_interrupted_requests_come_first_and_the_oldest_always_advances():
    model, rng = model_of(), random.Random(8)
    engine, ended = serve.Engine(model, TOKENIZER, 6, 6, chunk=16), []          # room for one full context
    note = lambda r, item: item is None and ended.append(r.id)
    asked = [(text(rng, 10, 30), 60, dict(seed=i, stop_ids=())) for i in range(8)]
    requests = [engine.submit(*each, on_token=note) for each in asked]
    work(engine)
    assert ended[0] == 0 and engine.stats()["preemptions"] > 5
    assert [r.new for r in requests] == [solo(model, *each)[0] for each in asked]
    idle(engine)


# ---- ends, errors, threads

def test_random_cancels_and_timeouts_hurt_nobody():
    model = model_of()
    for seed in range(2):
        rng = random.Random(seed)
        engine = serve.Engine(model, TOKENIZER, 5, 9, chunk=16)
        asked, requests, ended = [], [], []
        for i in range(25):
            asked.append((text(rng, 1, 60), rng.randint(1, 40), dict(seed=i, stop_ids=())))
            late = rng.random() < 0.2
            requests.append(engine.submit(*asked[-1], deadline=time.monotonic() + (0.02 if late else 1e6), key=str(i % 3),
                                          on_token=lambda r, item: ended.append(r.id) if item is None else None))
            engine.step()
            if rng.random() < 0.4:
                victim = rng.choice(requests)
                victim.cancel()
                engine.step()
                assert victim.finish_reason
        work(engine)
        idle(engine)
        assert sorted(ended) == list(range(25))
        for request, each in zip(requests, asked):
            expected = solo(model, *each)[0]
            assert request.new == expected[:len(request.new)]
            assert request.finish_reason in ("cancelled", "timeout") or request.new == expected


def test_errors_stay_with_their_request():
    class Broken(Constraint):
        def allowed(self, state, left):
            raise ValueError("too many states")

    model, prompt = model_of(), [1, 2, 3]
    expected = solo(model, prompt, 9, dict(stop_ids=()))[0]
    engine, broken = serve.Engine(model, TOKENIZER, 4), Broken.regex("a+", TOKENIZER)

    def shout(request, item):
        raise RuntimeError("the client is gone")

    fine = engine.submit(prompt, 9, dict(stop_ids=()))
    bad = engine.submit(prompt, 9, on_token=shout)
    broken.ends = lambda state: False
    worse = engine.submit(prompt, 9, dict(constraint=broken))
    worst = engine.submit(prompt, 9, dict(constraint=Broken.regex("a*", TOKENIZER)))       # fails before its first token
    work(engine)
    assert fine.new == expected and {r.finish_reason for r in (bad, worse, worst)} == {"error"}
    assert "client is gone" in bad.error and "too many states" in worse.error == worst.error
    idle(engine)


def test_a_row_that_is_not_a_number_hurts_no_neighbour_and_no_successor(monkeypatch):
    model = model_of()
    with torch.no_grad():
        model.embed_tokens.weight[77] = math.inf                   # a text with this id computes NaN
    engine = serve.Engine(model, TOKENIZER, 2)
    fine, bad = [1, 2, 3], [77] * 40
    options = dict(stop_ids=(), forbidden=(77,))
    expected = solo(model, fine, 30, options)[0]
    requests = [engine.submit(prompt, 30, options) for prompt in (bad, fine, bad, fine, fine)]
    work(engine)
    assert [r.finish_reason for r in requests] == ["error", "length", "error", "length", "length"]
    assert all(r.new == expected for r in requests if r.prompt == fine) and "not finite" in requests[0].error
    assert not engine.pool.block_of.keys() & set(engine.pool.keys(bad))


def test_a_step_that_fails_ends_its_requests_and_not_the_engine(capfd):
    model = model_of()
    engine, forward = serve.Engine(model, TOKENIZER, 2), model.forward
    thread = threading.Thread(target=engine.run)
    model.forward = lambda *args, **kwargs: 1 / 0
    requests = [engine.submit([1, 2], 5) for _ in range(3)]
    thread.start()
    assert [r.result(10) for r in requests] == [[], [], []] and {r.finish_reason for r in requests} == {"error"}
    model.forward = forward
    assert engine.submit([1, 2], 5, dict(stop_ids=())).result(10) == solo(model, [1, 2], 5, dict(stop_ids=()))[0]
    assert engine.drain(10) and "ZeroDivisionError" in requests[0].error and "ZeroDivision" in capfd.readouterr().err
    thread.join(10)
    idle(engine)


def test_a_constraint_that_ends_at_once():
    engine = serve.Engine(model_of(), TOKENIZER, 2)
    requests = [engine.submit([1], 5, dict(constraint=Constraint.regex(pattern, TOKENIZER))) for pattern in ("", "", "ab", "")]
    work(engine)
    assert [(bytes(r.new), r.finish_reason) for r in requests] == [(b"", "stop"), (b"", "stop"), (b"ab", "stop"), (b"", "stop")]
    idle(engine)


def test_threads_submit_and_drain():
    model = model_of()
    engine = serve.Engine(model, TOKENIZER, 4, max_queue=1000)
    thread = threading.Thread(target=engine.run)
    thread.start()
    found = {}

    def client(number):
        rng = random.Random(number)
        for i in range(6):
            prompt = text(rng, 1, 30)
            request = engine.submit(prompt, 8, dict(seed=i, stop_ids=()), key=str(number))
            found[number, i] = prompt, request, request.result(60)
            assert set(engine.snapshot()["stats"]) == set(engine.stats())

    clients = [threading.Thread(target=client, args=(n,)) for n in range(5)]
    for each in clients:
        each.start()
    vectors = engine.embed([[1, 2, 3], [4, 5]])
    for each in clients:
        each.join(60)
    assert len(found) == 30
    for (_, i), (prompt, request, new) in found.items():
        assert new == solo(model, prompt, 8, dict(seed=i, stop_ids=()))[0]
    hidden = model(torch.tensor([[4, 5]]), hidden=True)[0].mean(dim=0)
    assert torch.allclose(torch.tensor(vectors[1]), hidden / hidden.norm(), atol=1e-6)
    late = engine.submit([1], 50, dict(stop_ids=()))
    assert engine.drain(60) and late.finish_reason == "length"
    with pytest.raises(serve.QueueFull):
        engine.submit([1], 5)
    thread.join(10)
    assert not thread.is_alive()
    idle(engine)


def test_a_full_queue_says_when_to_come_back():
    engine = serve.Engine(model_of(), TOKENIZER, 1, max_queue=3)
    for _ in range(3):
        engine.submit([1], 5)
    with pytest.raises(serve.QueueFull) as caught:
        engine.submit([1], 5)
    assert caught.value.retry_after >= 1
    assert not engine.drain(0) and engine.stats()["cancelled"] == 3
    idle(engine)


def test_too_few_blocks_for_one_text():
    with pytest.raises(ValueError, match="--blocks=5.*needs 6"):
        serve.Engine(model_of(), TOKENIZER, blocks=5)


# ---- adapters

@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """(folder of a base model, {name: folder of an adapter})"""
    root = tmp_path_factory.mktemp("adapters")
    save_model(root / "base", make(seed=1, eos_token_id=256, block_size=96), TOKENIZER)
    folders = {}
    for seed, (name, targets) in enumerate({"a": (), "b": ("q_proj", "down_proj", "lm_head")}.items()):
        model = load_model(root / "base")[0]
        finetune_lora.add_adapters(model, "lora", targets, rank=3 + seed, alpha=8.0)
        with torch.no_grad():
            for p in finetune_lora.trained(model).values():
                p.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
        folders[name] = root / name
        finetune_lora.save_adapter(folders[name], model, root / "base", TOKENIZER)
    finetune_lora.add_adapters(model := load_model(root / "base")[0], "dora", rank=2)
    finetune_lora.save_adapter(root / "dora", model, root / "base", TOKENIZER)
    return root, folders


def test_several_adapters_in_one_batch_are_their_solo_runs(adapted):
    root, folders = adapted
    models = {name: load_model(folder)[0].pack() for name, folder in (*folders.items(), (None, root / "base"))}
    engine = serve.Engine(load_model(root / "base")[0].pack(), TOKENIZER, 7, 20, chunk=16, adapters=folders)
    rng, prefix, got = random.Random(0), text(random.Random(9), 33, 33), {}
    asked = [(prefix + text(rng, 1, 20) if i % 2 else text(rng, 1, 40), 20, dict(seed=i, stop_ids=())) for i in range(18)]
    names = [rng.choice(["a", "b", None]) for _ in asked]
    requests = [engine.submit(*each, adapter=name, on_token=lambda r, item: got.setdefault(r.id, []).append(item))
                for each, name in zip(asked, names)]
    work(engine)
    texts = set()
    for request, each, name in zip(requests, asked, names):
        ids, values = solo(models[name], *each)
        assert request.new == ids, name
        assert all(math.isclose(item[1], value[0], abs_tol=2e-4) for item, value in zip(got[request.id], values))
        texts.add(tuple(solo(models[None], *each)[0]) == tuple(ids))
    assert texts == {True, False}                                  # the adapters do change something
    idle(engine)
    with pytest.raises(ValueError, match="there are a, b"):
        engine.submit([1], 3, adapter="c")


def test_an_adapter_that_learnt_chats_beside_a_base_that_did_not(adapted, tmp_path):
    root, folders = adapted
    shutil.copytree(folders["a"], tmp_path / "a")
    ends = dict(eos_token_id=[256, TOKENIZER.im_end_id])
    (tmp_path / "a/generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
    engine = serve.Engine(load_model(root / "base")[0].pack(), TOKENIZER, adapters=dict(a=tmp_path / "a", b=folders["b"]))
    assert engine.submit([1], 3, adapter="a").row is None and engine.queue.queues[""][0].start[3] == {256, TOKENIZER.im_end_id}
    assert {name: set(ids) for name, ids in engine.adapters.stop_ids.items()} == dict(a={256, TOKENIZER.im_end_id}, b={256})
    app = api.build_app(engine, TOKENIZER, Settings(chat=False, model_name="base", log=lambda line: None))
    with TestClient(app, base_url="http://localhost") as client:
        def ask(model):
            return client.post("/v1/chat/completions", json=dict(model=model, max_tokens=3, messages=[dict(role="user", content="x")]))
        assert [model["chat"] for model in client.get("/v1/models").json()["data"]] == [False, True, False]
        assert ask("a").json()["usage"]["prompt_tokens"] > 10
        for name in ("base", "b"):
            assert ask(name).status_code == 400 and "one of the models a" in ask(name).json()["error"]["message"]


def test_only_lora_beside_others(adapted):
    root, folders = adapted
    with pytest.raises(ValueError, match="dora.*Serve it alone"):
        serve.Engine(load_model(root / "base")[0], TOKENIZER, adapters={"x": root / "dora"})


def test_a_quantized_model_needs_no_flag():
    model, rng = make(seed=1, eos_token_id=256, block_size=96, n_embd=64, n_hidden=128), random.Random(4)
    quantize_model(model, "nf4").pack()
    engine = serve.Engine(model, TOKENIZER, 4, chunk=16)
    asked = [(text(rng, 1, 40), 15, dict(seed=i, stop_ids=())) for i in range(9)]
    requests = [engine.submit(*each) for each in asked]
    work(engine)
    assert [r.new for r in requests] == [solo(model, *each)[0] for each in asked]


def test_an_adapter_of_another_base_is_refused(adapted, tmp_path):
    root, folders = adapted
    save_model(tmp_path / "other", make(seed=2, eos_token_id=256, block_size=96), TOKENIZER)
    with pytest.raises(ValueError, match="weights are not those of"):
        serve.Engine(load_model(tmp_path / "other")[0], TOKENIZER, adapters=folders, folder=tmp_path / "other")
    serve.Engine(load_model(root / "base")[0], TOKENIZER, adapters=folders, folder=root / "base")
