"""Verdicts, ratings and agreement: formulas against scikit-learn, scipy and hand-made cases; the page against its key."""
import json
import math
import random
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from nanopath import judge as j


def says(text):
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]


def longer_wins(messages):
    first, second = messages[-1]["content"].split("=====")
    sizes = [len(part.split("]\n")[-1].strip()) for part in (first, second)]
    return "Because.\n[[A]]" if sizes[0] > sizes[1] else "[[B]]" if sizes[1] > sizes[0] else "[[C]]"


def test_both_orders_must_agree():
    assert j.judge_pair(longer_wins, says("long answer"), says("short"))[:2] == (1.0, True)
    assert j.judge_pair(longer_wins, says("short"), says("long answer"))[:2] == (0.0, True)
    assert j.judge_pair(longer_wins, says("same"), says("size"))[:2] == (0.5, True)
    assert j.judge_pair(lambda messages: "[[A]]", says("x"), says("y"))[:2] == (0.5, False)          # always the first
    assert j.judge_pair(lambda messages: "no idea", says("x"), says("y"))[:2] == (0.5, False)
    assert j.judge_pair(lambda m: "[[A]] or rather [[ B ]] [[Z]]", says("x"), says("y"))[:2] == (0.5, False)
    assert j.judge_one(lambda m: "1 of [[3]] [[11]]\n[[7]]", says("x"))[0] == 7 and j.judge_one(lambda m: "", says("x"))[0] is None


def test_several_turns_are_one_conversation():
    seen = []

    def answer(messages):
        seen.append([message["role"] for message in messages])
        return f"answer {len(seen)}"
    messages = j.converse(answer, ["first", "second"])
    assert [message["content"] for message in messages] == ["first", "answer 1", "second", "answer 2"]
    assert seen == [["user"], ["user", "assistant", "user"]]


def test_wilson_interval():
    assert j.win_rate([1] * 10)[0] == 1 and j.win_rate([1] * 10)[1] == pytest.approx(0.7224672, abs=1e-6)
    p, low, high = j.win_rate([1] * 6 + [0] * 4)
    assert (p, low, high) == pytest.approx((0.6, 0.3126738, 0.8318197), abs=1e-5)
    with pytest.raises(ValueError, match="no games"):
        j.win_rate([])


def test_bradley_terry_is_the_likeliest():
    optimize = pytest.importorskip("scipy.optimize")
    generator, players = random.Random(0), "abcd"
    games = []
    for _ in range(200):
        a, b = generator.sample(players, 2)
        games.append((a, b, generator.choice([1.0, 1.0, 0.5, 0.0] if a < b else [0.0, 0.0, 0.5, 1.0])))
    ratings = j.bradley_terry(games)
    more = [*games, *((a, b, 0.5) for a in players for b in players if a < b)]

    def cost(values):
        r = dict(zip(players, values))
        chance = [1 / (1 + 10 ** ((r[b] - r[a]) / 400)) for a, b, _ in more]
        return -sum(s * math.log(p) + (1 - s) * math.log(1 - p) for p, (_, _, s) in zip(chance, more))
    best = optimize.minimize(cost, [1000.0] * 4, method="BFGS", options=dict(gtol=1e-9)).x
    best = best - best.mean() + 1000
    assert [ratings[p] for p in players] == pytest.approx(best, abs=1e-2)
    assert ratings["a"] > ratings["b"] > ratings["c"] > ratings["d"]
    assert j.bradley_terry([("x", "y", 1.0)] * 5)["x"] < 2000
    assert j.elo([("x", "y", 1.0)]) == {"x": 1016.0, "y": 984.0}


def test_kappa_and_alpha():
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = random.Random(1)
    a = [generator.randint(1, 5) for _ in range(80)]
    b = [x if generator.random() < 0.6 else generator.randint(1, 5) for x in a]
    for weights in (None, "linear", "quadratic"):
        assert j.cohen_kappa(a, b, weights) == pytest.approx(sklearn.cohen_kappa_score(a, b, weights=weights), abs=1e-12)
    assert math.isnan(j.cohen_kappa([1, 1], [1, 1]))
    # Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", example C: nominal 0.743, ordinal 0.815, interval 0.849
    table = [[1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None], [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
             [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None], [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None]]
    for level, value in (("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)):
        assert j.krippendorff_alpha(table, level) == pytest.approx(value, abs=5e-4)


def test_the_page_is_blind_and_its_ratings_come_back(tmp_path):
    questions = [f"question {i} </script><b>" for i in range(20)]
    answers = {"zebra-7b": [f"z{i} <img src=x onerror=alert(1)>" for i in range(20)], "ant-1b": [f"a{i}" for i in range(20)]}
    page = tmp_path / "page.html"
    j.write_page(page, questions, answers, seed=3)
    text = page.read_text(encoding="utf-8")
    assert "zebra" not in text and "ant-1b" not in text and text.count("</script>") == 2 and "<img" not in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    key = json.loads((tmp_path / "page.html.key.json").read_text(encoding="utf-8"))["items"]
    assert {entry["A"] for entry in key} == set(answers) and sorted(entry["item"] for entry in key) == list(range(20))
    rated = []
    for item, entry in zip(data["items"], key):
        assert item["question"] == questions[entry["item"]] and item["A"] == answers[entry["A"]][entry["item"]]
        rated.append({"choice": "A" if entry["A"] == "ant-1b" else "B", "markA": 5 if entry["A"] == "ant-1b" else 1,
                      "markB": 5 if entry["B"] == "ant-1b" else 1})
    rated[0] = {}
    (tmp_path / "r.json").write_text(json.dumps({"id": data["id"], "ratings": rated}), encoding="utf-8")
    found = j.read_ratings([tmp_path / "r.json"] * 2, tmp_path / "page.html.key.json")
    assert found["models"] == ["ant-1b", "zebra-7b"]
    assert [found["scores"][0].count(value) for value in (1.0, None)] == [19, 1]
    assert found["marks"][0][:20].count(5) == 19 and found["marks"][0][20:].count(1) == 19
    assert j.krippendorff_alpha(found["marks"], "ordinal") == 1.0
    (tmp_path / "r.json").write_text(json.dumps({"id": "other", "ratings": rated}), encoding="utf-8")
    with pytest.raises(ValueError, match="another page"):
        j.read_ratings([tmp_path / "r.json"], tmp_path / "page.html.key.json")


def test_a_server_that_is_busy_once_and_one_that_is_wrong():
    calls = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            calls.append(body)
            code = 503 if len(calls) == 1 else 404 if body["model"] == "missing" else 200
            reply = json.dumps({"choices": [{"message": {"content": body["messages"][-1]["content"].upper()}}]}).encode()
            self.send_response(code)
            self.end_headers()
            self.wfile.write(b"no such model" if code == 404 else reply)

        def log_message(self, *words):
            pass
    service = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{service.server_port}/v1"
    assert j.server(address, "m")([{"role": "user", "content": "hi"}]) == "HI" and len(calls) == 2
    with pytest.raises(ConnectionError, match="404.*no such model"):
        j.server(address, "missing")([{"role": "user", "content": "hi"}])
    service.shutdown()
    service.server_close()
    with pytest.raises(ConnectionError, match="127.0.0.1"):
        j.server(address, "m", tries=1)([{"role": "user", "content": "hi"}])


def test_question_files(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text('{"turns": ["a", "b"]}\n\n{"prompt": "c"}\n{"question": "d"}\n', encoding="utf-8")
    assert j.read_questions(file) == [["a", "b"], ["c"], ["d"]]
    file.write_text('{"prompt": "c"}\n{"text": 3}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2"):
        j.read_questions(file)
