"""Programs that models write: honest ones pass, every way of cheating or doing harm fails and leaves nothing behind."""
import gzip
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import DATA

from nanopath.untrusted import isolation, run_program

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX limits")


@pytest.mark.parametrize("code,words", [
    ("assert 1 == 2", "AssertionError"), ("import sys; sys.exit(0)", "before its last line"),
    ("raise SystemExit", "before its last line"), ("import os; os._exit(0)", "before its last line"),
    ("def f(:", "SyntaxError"), ("input()", "EOFError"), ("open('verdict', 'w').write('yes'); 1 / 0", "ZeroDivisionError"),
    ("import os\nopen('verdict', 'w').write('passed')\nos._exit(0)", "before its last line"),
    ("raise ValueError('x' * 10000)", "ValueError"), ("import os; os.mkfifo('verdict'); os.symlink('/dev/zero', 'x'); 1 / 0", "ZeroDivision"),
    ("import os, time; os.mkfifo('verdict'); time.sleep(60)", "longer than 1.5 s"), ("import os; os.symlink('/dev/zero', 'verdict'); os._exit(0)", "last line"),
    ("import os; os.remove('output'); os.mkfifo('output'); os._exit(0)", "last line"), ("import os; os.remove('output'); os.mkdir('output'); 1 / 0", "ZeroDivision"), ("while True: pass", "longer than 1.5 s"),
    ("import time; time.sleep(60)", "longer than 1.5 s")])
def test_what_does_not_reach_its_end_fails(code, words):
    begin = time.monotonic()
    outcome = run_program(code, seconds=1.5)
    assert not outcome.passed and words in outcome.reason and "\n" not in outcome.reason
    assert time.monotonic() - begin < 10


@posix
@pytest.mark.parametrize("code,words", [
    ("x = 'a' * (2 << 30)", "MemoryError"), ("with open('f', 'wb') as f:\n    while True: f.write(b'a' * 10000)", "File too large"),
    ("while True: print('x' * 1000)", "more than 1 MB")])
def test_limits(code, words):
    outcome = run_program(code, seconds=20)
    assert not outcome.passed and words in outcome.reason


def test_the_network_is_off_where_namespaces_are():
    outcome = run_program("import socket; socket.create_connection(('127.0.0.1', 9), timeout=2)", seconds=10)
    assert not outcome.passed
    if isolation():
        assert "unreachable" in outcome.reason


@posix
def test_children_do_not_survive():
    mark = f"9{os.getpid()}.25"
    code = f"import os, time\nfor i in range(6):\n    if os.fork() == 0:\n        os.execvp('sleep', ['sleep', '{mark}'])\ntime.sleep(0.3)"
    assert run_program(code, seconds=10).passed
    time.sleep(0.2)
    found = subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True).stdout
    assert f"sleep {mark}" not in found


def test_honest_programs_pass_and_see_nothing_of_ours(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    outcome = run_program("import os, sys\nprint(sorted(os.environ), sys.argv)\nassert __name__ == '__main__'\nprint('é😀')")
    assert outcome.passed and "secret" not in outcome.output and "HF_TOKEN" not in outcome.output and "é😀" in outcome.output
    assert run_program("import threading, time; threading.Thread(target=lambda: time.sleep(60)).start()").passed
    with ThreadPoolExecutor(4) as pool:
        assert [o.passed for o in pool.map(run_program, ["pass", "1 / 0"] * 10)] == [True, False] * 10


def test_the_solutions_of_humaneval_pass():
    file = DATA / "HumanEval.jsonl.gz"
    if not file.is_file():
        pytest.skip("no HumanEval.jsonl.gz in NANOPATH_DATA")
    rows = [json.loads(line) for line in gzip.open(file, "rt", encoding="utf-8")]
    programs = [f"{row['prompt']}{row['canonical_solution']}\n{row['test']}\ncheck({row['entry_point']})\n" for row in rows]
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda code: run_program(code, seconds=60), programs))
    assert len(rows) == 164 and [row["task_id"] for row, o in zip(rows, outcomes) if not o.passed] == []
    broken = [code.replace("    return ", "    return None and ") for code in programs[:20]]
    assert sum(run_program(code, seconds=20).passed for code in broken) < 5
