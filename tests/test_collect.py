"""rlhf.py collect and judge: votes become the pairs that dpo reads, nothing is asked twice, win rates are those of the rewards."""
import json
import re
import shutil
import sys
import threading
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
import torch

import rlhf as r
from bpe import Tokenizer
from conftest import run
from data.pairs import open_pairs, read_prompts
from model import GPT, GPTConfig, load_model, save_model
from nanopath import collect as c
from nanopath.judge import win_rate
from nanopath.rewards import reward_function
from nanopath.run import parse_run

PROMPTS = [f"What is {i} times {i}?" for i in range(6)]


@pytest.fixture(scope="session")
def place(tiny, tmp_path_factory):
    """A folder with two random models, prompts, a reward file and a tokenizer without a template."""
    folder, tokenizer = tmp_path_factory.mktemp("collect"), Tokenizer.load(tiny)
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=64, n_layer=1, n_embd=16, n_head=1, n_kv_head=1, head_dim=16,
                              n_hidden=16, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id))
        torch.nn.init.normal_(model.embed_tokens.weight, 0.0, 0.5)
        save_model(folder / name, model, tokenizer)
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS, "", PROMPTS[0]]) + "\n", encoding="utf-8")
    (folder / "reward.py").write_text("def short(row, text):\n    return -len(text) if 'What' in row['prompt'] else 0 / 0\n\n"
                                      "def broken(row, text):\n    return 1 / 0\n\ndef equal(row, text):\n    return 1\n", encoding="utf-8")
    return folder


@pytest.fixture
def rlhf(place, tmp_path, monkeypatch, capsys):
    """rlhf.py inside this process; its output."""
    def inside(what, *flags, dataset="prompts.txt", out="votes.jsonl"):
        flags = [*([] if any(flag.startswith("--model") for flag in flags) else [f"--model={place / 'a'}"]), *flags]
        monkeypatch.setattr(sys, "argv", ["rlhf.py", what, f"--dataset={place / dataset}", f"--out={tmp_path / out}", "--device=cpu",
                                          "--dtype=float32", "--max_new_tokens=12", *flags])
        try:
            r.main(parse_run(r.Config, {}, r.__doc__))
        finally:
            torch.set_flush_denormal(False)
        return capsys.readouterr().out
    return inside


def votes_file(folder, keys):
    (folder / "keys.txt").write_text("\n".join(keys) + "\n", encoding="utf-8")
    return f"--votes={folder / 'keys.txt'}"


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_votes_become_pairs_and_nothing_is_asked_twice(rlhf, tmp_path, place):
    text = rlhf("collect", votes_file(tmp_path, ["1", "2", "="]))
    shown = re.findall(r"---- (\d) of 6, 0 skipped\n([^\n]+)\n\n\[1\] (.*?)\n\n\[2\] (.*?)\n\n", text, re.S)
    pairs, ties = rows(tmp_path / "votes.jsonl"), rows(tmp_path / "votes.ties.jsonl")
    assert [item[:2] for item in shown] == [(str(i), PROMPTS[i]) for i in range(4)]
    raw = [[c.on_screen(pair[side]) for side in ("chosen", "rejected")] for pair in pairs]
    assert raw == [list(shown[0][2:]), list(shown[1][:1:-1])] and ties[0]["vote"] == "ties"
    assert "2 pairs, 1 ties, 3 left" in text and f"dpo --model={place / 'a'} --dataset={tmp_path / 'votes.jsonl'}" in text

    text = rlhf("collect", votes_file(tmp_path, ["s", "1", "2"]))
    assert "has the votes on 3 of 6" in text and "---- 4 of 6, 1 skipped" in text and "left" not in text
    assert [row["prompt"] for row in rows(tmp_path / "votes.jsonl")] == [PROMPTS[i] for i in (0, 1, 4, 5)]
    before = (tmp_path / "votes.jsonl").read_bytes()
    assert "4 pairs, 1 ties, 1 skipped" in rlhf("collect", votes_file(tmp_path, ["1"])) and (tmp_path / "votes.jsonl").read_bytes() == before

    whole = rlhf("collect", votes_file(tmp_path, ["1", "2", "=", "s", "1", "2"]), out="whole.jsonl")
    assert (tmp_path / "whole.jsonl").read_bytes() == before and "4 pairs" in whole       # the same samples in one run and in two

    _, tokenizer = load_model(place / "a", "cpu")
    cfg = r.Config(dataset=str(tmp_path / "votes.jsonl"))
    train, held_out, tasks, lost, _ = open_pairs(cfg, tokenizer, 256)
    assert (len(train), len(held_out), lost) == (3, 1, [])
    learnt = [tokenizer.decode(ids[start:-1]).strip() for (ids, start), _ in train + held_out]
    assert sorted(learnt) == sorted(row["chosen"] for row in rows(tmp_path / "votes.jsonl"))


def test_undo_takes_back_what_was_written(rlhf, tmp_path):
    rlhf("collect", votes_file(tmp_path, ["u", "1", "=", "2", "u", "u", "u", "2", "1", "q", "1"]))
    other = rlhf("collect", votes_file(tmp_path, ["2", "1"]), out="plain.jsonl")
    assert (tmp_path / "votes.jsonl").read_bytes() == (tmp_path / "plain.jsonl").read_bytes()
    assert (tmp_path / "votes.ties.jsonl").read_bytes() == b"" and "2 pairs, 4 left" in other


def test_equal_and_empty_responses_are_drawn_again_then_skipped(tmp_path):
    class Voice:
        asked = []

        def fits(self, prompt):
            return prompt[0]["content"] != "long"

        def say(self, prompts, seeds):
            self.asked += [(prompt[0]["content"], seed) for prompt, seed in zip(prompts, seeds)]
            return None, [{"same": "x", "empty": ["", "x"][seed % 2], "late": str(seed // 4 % 2 and seed)}.get(prompt[0]["content"], str(seed))
                          for prompt, seed in zip(prompts, seeds)], None

    prompts = [[{"role": "user", "content": name}] for name in ("same", "late", "long", "good", "empty", "last")]
    votes = c.Votes(tmp_path / "v.jsonl", prompts, [Voice()], seed=3)
    assert votes.current[0][0]["content"] == "late" and votes.progress() == "1 of 6, 1 skipped"
    assert votes.vote("=") is None and votes.current[0][0]["content"] == "good" and votes.progress() == "3 of 6, 2 skipped"
    votes.vote("1")
    assert votes.current[0][0]["content"] == "last" and votes.undo() is None and votes.undo() is None
    assert votes.current[0][0]["content"] == "late" and votes.progress() == "3 of 6, 3 skipped"
    assert [row["prompt"] for row in rows(tmp_path / "v.ties.jsonl")] == ["same", "long", "empty"]
    votes.vote("2")
    votes.vote("2")
    assert [row["prompt"] for row in rows(tmp_path / "v.jsonl")] == ["late", "good"] and votes.current[0][0]["content"] == "last"
    for name, times in (("same", 2 * c.TRIES), ("long", 0), ("good", 2), ("empty", 2 * c.TRIES)):
        seeds = [seed for prompt, seed in Voice.asked if prompt == name]
        assert len(set(seeds)) == len(seeds) == times


def test_the_order_is_blind_and_both_models_are_asked(tmp_path):
    class Voice(str):
        def fits(self, prompt):
            return True

        def say(self, prompts, seeds):
            return None, [self] * len(prompts), None

    prompts = [(i, [{"role": "user", "content": str(i)}]) for i in range(400)]
    firsts = [pair[0] for _, pair in c.sample_pairs(prompts, [Voice("a"), Voice("b")], 0)]
    assert 160 < firsts.count("a") < 240


def test_the_page_takes_votes_and_nothing_from_elsewhere(rlhf, place, tmp_path, monkeypatch):
    found, text = [], "<script>alert(1)</script>"

    def call(address, body=None):
        try:
            with urllib.request.urlopen(urllib.request.Request(address, body and json.dumps(body).encode()), timeout=10) as reply:
                return reply.status, reply.headers, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, b""

    def person(address):
        try:
            status, headers, page = call(address)
            assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"] and text.encode() not in page
            assert b"innerHTML" not in page and not re.search(rb"(src|href)=.?(http|//)", page)
            root = re.match(r"http://127.0.0.1:\d+/", address)[0]
            for wrong in (root, root + "vote", address.rstrip("/"), root + "x" * 22 + "/vote"):
                assert call(wrong)[0] == 404 and call(wrong, {"key": "1", "number": 0})[0] == 404
            assert call(address + "vote", {"key": "1" * 2000, "number": 0})[0] == 404 and call(address + "vote", ["1"])[0] == 400
            for vote in (("1", 0), ("1", 0), ("x", 1), ("=", 1), ("u", 2), ("2", 1)):
                found.append(json.loads(call(address + "vote", dict(zip(("key", "number"), vote)))[2]))
        except BaseException as error:                             # an assertion that failed: shown by the test below
            found.append(error)
        finally:
            call(address + "vote", {"key": "q", "number": 0})

    def say(*words, **options):
        if "http://" in words[0]:
            threading.Thread(target=person, args=(re.search(r"http://\S+", words[0])[0],)).start()
    monkeypatch.setattr(c, "print", say, raising=False)
    monkeypatch.setattr(c.Voice, "say", lambda self, prompts, seeds: (None, [f"{text}{seed}" for seed in seeds], None))
    rlhf("collect", "--page")
    assert [isinstance(item, dict) for item in found] == [True] * 6, found
    assert [(item["number"], bool(item["problem"])) for item in found] == [(1, False), (1, True), (1, True), (2, False), (1, False), (2, False)]
    assert found[0]["prompt"] == found[4]["prompt"] == PROMPTS[1] and text in found[0]["responses"][0]
    assert rows(tmp_path / "votes.jsonl")[1]["chosen"] == found[4]["responses"][1] and rows(tmp_path / "votes.ties.jsonl") == []


def test_the_win_rate_is_that_of_the_rewards(rlhf, place, tmp_path):
    text = rlhf("judge", f"--other={place / 'b'}", f"--reward={place / 'reward.py'}:short")
    said = {}
    for name in ("a", "b"):
        model, tokenizer = load_model(place / name, "cpu")
        prompts = [[{"role": "user", "content": p}] for p in PROMPTS]
        said[name] = r.respond(r.Config(max_new_tokens=12), model, tokenizer, prompts, 0.0)
    worst = {name: min([0, *(-len(t) for t in said[name][1])]) for name in said}
    rewards = {name: [-len(t) if done else worst[name] for t, done in zip(said[name][1], said[name][2])] for name in said}
    scores = [0.5 if a == b else float(a > b) for a, b in zip(rewards["a"], rewards["b"])]
    rate, low, high = win_rate(scores)
    assert f"{place / 'a'} against {place / 'b'}: {rate:.1%} [{low:.1%}, {high:.1%}] of 6 questions" in text and "order" not in text
    assert f"{place / 'a'}: mean reward {sum(rewards['a']) / 6:.4f}" in text and "characters per answer" in text
    assert [row["score"] for row in rows(tmp_path / "votes.jsonl")] == scores
    swapped = rlhf("judge", f"--model={place / 'b'}", f"--other={place / 'a'}", f"--reward={place / 'reward.py'}:short")
    assert f"{1 - rate:.1%} [{1 - high:.1%}, {1 - low:.1%}]" in swapped
    assert "50.0% [" in rlhf("judge", f"--other={place / 'b'}", f"--reward={place / 'reward.py'}:equal")


def test_a_judge_model_hears_both_orders(rlhf, place, monkeypatch):
    monkeypatch.setattr(c, "server", lambda *_: lambda messages: "[[A]]")
    text = rlhf("judge", f"--other={place / 'b'}", "--judge=http://127.0.0.1:9/v1")
    assert "50.0% [" in text and "survived the change of order in 0%" in text and "6 ties" in text


def test_a_reward_model_needs_the_tokenizer_of_the_model_that_responds(place):
    judge = SimpleNamespace(config=SimpleNamespace(labels=("reward",)))
    name, machine, mine = str(place / "a"), SimpleNamespace(device="cpu"), SimpleNamespace(hash="x")
    reward_function("reward", name, machine, lambda *_: (judge, mine), [mine])
    with pytest.raises(SystemExit, match="--reward=.* another tokenizer"):
        reward_function("reward", name, machine, lambda *_: (judge, mine), [mine, SimpleNamespace(hash="y")])


def test_prompts_come_from_every_kind_of_file(tmp_path):
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [
        {"prompt": "p", "chosen": "x", "rejected": "y", "skill": "s"}, {"question": "q", "answer": "x"}, {"prompt": chat}, {"prompt": "p"},
        {"chosen": [*chat, {"role": "assistant", "content": "x"}], "rejected": [*chat, {"role": "assistant", "content": "y"}]}]), encoding="utf-8")
    _, found = read_prompts(str(tmp_path / "rows.jsonl"))
    assert [row["row"] for row in found[:2]] == [{"prompt": "p", "skill": "s"}, {"question": "q", "answer": "x"}]   # for the reward
    assert [row["prompt"] for row in found] == [[{"role": "user", "content": "p"}], [{"role": "user", "content": "q"}], chat]
    assert c.as_text(chat) == "[system]\nBe kind.\n\n[user]\nHello?" and c.Votes.plain(chat) is chat


@pytest.mark.parametrize("what, flags, message", [
    ("collect", ["--kl=0.1"], "--kl: has no effect with collect"), ("collect", ["--reward=x", "--rank=3"], "--rank, --reward: has no effect"),
    ("dpo", ["--page"], "--page: has no effect with dpo"), ("judge", [], "add --other=FOLDER"), ("judge", ["--other=b", "--seed=1"], "--seed: has no effect"),
    ("judge", ["--other=b", "--judge=c", "--reward=d"], "choose one"), ("judge", ["--other=b", "--judge_model=c"], "add --judge=http"),
    ("collect", ["--loss=dpo"], "--loss"), ("collect", ["--votes=/nowhere/keys"], "--votes=/nowhere/keys: No such file"),
    ("collect", ["--dataset=/nowhere"], "--dataset=/nowhere: no prompts there"), ("collect", ["--model=/nowhere"], "--model=/nowhere: "),
    ("judge", ["--other=/nowhere"], "--other=/nowhere: "), ("collect", ["--out=votes"], "a name that ends in .jsonl"),
    ("collect", ["--out={place}/reward.py/v.jsonl"], "reward.py"), ("collect", ["--out={place}/a.jsonl"], "a.jsonl line 1: not a row"),
    ("collect", ["--dataset={place}/empty.txt"], "it holds no prompts"), ("collect", ["--votes={place}/bad.txt"], "bad.txt line 2: 'better' is no vote"),
    ("collect", ["--model={place}/mute"], "--model={place}/mute: this tokenizer has no chat template"),
    ("judge", ["--other={place}/b", "--reward={place}/reward.py:broken"], "the reward failed for every prompt"),
    ("judge", ["--other={place}/b", "--max_new_tokens=64"], "no prompt leaves room"),
    ("judge", ["--other={place}/a"], "is --model itself")])
def test_bad_input_is_one_line(rlhf, place, what, flags, message):
    (place / "a.jsonl").write_text("[1]\n", encoding="utf-8")
    (place / "empty.txt").write_text("\n \n", encoding="utf-8")
    (place / "bad.txt").write_text("1\nbetter\n", encoding="utf-8")
    shutil.copytree(place / "a", place / "mute", dirs_exist_ok=True)
    (place / "mute/tokenizer_config.json").write_text('{"chat_template": null}', encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        rlhf(what, *(flag.format(place=place) for flag in flags))
    assert message.format(place=place) in str(stop.value) and "\n" not in str(stop.value)


def test_standard_input_votes_too(place, tmp_path):
    done = run(r.__file__, "collect", f"--model={place / 'a'}", f"--other={place / 'b'}", f"--dataset={place / 'prompts.txt'}",
               f"--out={tmp_path / 'v.jsonl'}", "--max_new_tokens=12", "--device=cpu", cwd=tmp_path, input="1\nwhat\n2\n")
    assert len(rows(tmp_path / "v.jsonl")) == 2 and "'what' is no vote" in done.stdout and "2 pairs, 4 left" in done.stdout
