"""runs/path.py: a stage runs once, again when its command, script or input changes, and continues after an interruption."""
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest

from conftest import ROOT

spec = importlib.util.spec_from_file_location("path_of_stages", ROOT / "runs/path.py")
path = importlib.util.module_from_spec(spec)
spec.loader.exec_module(path)

SCRIPT = """
import pathlib, sys
out = pathlib.Path(next(word for word in sys.argv if word.startswith("--out="))[6:])
out.mkdir(parents=True, exist_ok=True)
with open("calls.txt", "a", encoding="utf-8") as file:
    print(*sys.argv[1:], file=file)
print("step 1/2  left 0:01")
if "--fail" in sys.argv:
    (out / "state/step-0000001").mkdir(parents=True)
    (out / "manifest.json").write_text("{}", encoding="utf-8")
    sys.exit("no memory\\nleft")
(out / "model").write_text("x", encoding="utf-8")
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text(SCRIPT.replace("\\\\n", "\\n"), encoding="utf-8")
    return tmp_path


def stage(number, *words):
    return path.Stage(number, f"python {number}.py {' '.join([*words, f'--out=out/{number}'])}", f"out/{number}/model", 1)


def calls(place):
    return (place / "calls.txt").read_text(encoding="utf-8").splitlines() if (place / "calls.txt").is_file() else []


def test_a_stage_runs_once_and_again_after_a_change(place, capsys):
    todo = [stage("one"), stage("two")]
    path.run_path(todo)
    assert len(calls(place)) == 2 and "[ 1/2] one" in capsys.readouterr().out
    path.run_path(todo)
    assert len(calls(place)) == 2 and capsys.readouterr().out.count("was done before") == 2
    path.run_path([stage("one"), stage("two", "--more")])
    assert calls(place)[2:] == ["--more --out=out/two"]
    (place / "one.py").write_text(SCRIPT.replace("\\\\n", "\\n") + "# changed", encoding="utf-8")
    path.run_path([stage("one"), stage("two", "--more")])           # the second reads what the first has made again
    assert calls(place)[3:] == ["--out=out/one", "--more --out=out/two"]
    (place / "out/two/model").unlink()
    path.run_path([stage("one"), stage("two", "--more")])
    assert calls(place)[5:] == ["--more --out=out/two"]


def test_a_stage_that_fails_continues_in_the_next_run(place, capsys):
    todo = [stage("one"), stage("two", "--fail")]
    with pytest.raises(SystemExit, match=r"no memory[^$]*two failed: python two.py --fail --out=out/two\nAll it printed: .*02-two.log"):
        path.run_path(todo)
    (place / "calls.txt").unlink()
    path.run_path(todo)                                             # its newest checkpoint is there
    assert calls(place) == ["--resume --out=out/two"]
    done = json.loads((place / "out/path/done.json").read_text(encoding="utf-8"))
    assert done["two"]["command"] == "python two.py --fail --out=out/two" and done["two"]["seconds"] >= 0


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interruption_reaches_the_stage_once(name, place):
    """The stage gets one SIGINT and saves, also where a terminal would send it to the whole group of processes."""
    (place / "slow.py").write_text("""
import pathlib, time
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.5)                                                # saves; a second signal would end it here
    pathlib.Path("saved").write_text("yes", encoding="utf-8")
""", encoding="utf-8")
    (place / "runner.py").write_text(f"""
import importlib.util, signal, sys
spec = importlib.util.spec_from_file_location("path_of_stages", {str(ROOT / 'runs/path.py')!r})
path = importlib.util.module_from_spec(spec)
spec.loader.exec_module(path)
path.stages = lambda quick: [path.Stage("slow", "python slow.py", "out/slow/model", 1)]
path.ROOT = "."
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["path.py"]
path.main()
""", encoding="utf-8")
    process = subprocess.Popen([sys.executable, "runner.py"], cwd=place, start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    log, began = place / "out/path/01-slow.log", time.monotonic()
    while not (log.is_file() and "ready" in log.read_text(encoding="utf-8")):
        assert time.monotonic() - began < 60
        time.sleep(0.1)
    os.killpg(process.pid, getattr(signal, name))                  # a terminal sends it to the whole group
    said = process.communicate(timeout=30)[1]
    assert process.returncode != 0 and (place / "saved").is_file() and "Traceback" not in said
    assert name != "SIGINT" or "stopped. Run the same command again" in said
    assert json.loads((place / "out/path/done.json").read_text(encoding="utf-8"))["slow"]["spent"] > 0


def test_the_stages_name_their_scripts_and_outputs():
    for quick in (False, True):
        todo = path.stages(quick)
        assert len(todo) == 10 and all((ROOT / each.command.split()[1]).is_file() for each in todo)


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_the_dry_run_of_the_large_path_names_flags_that_exist():
    files = {"SFT": "a.jsonl", "PREFERENCES": "b.jsonl", "TASKS": "c.jsonl", "REWARD": "r.py:f", "DRY": "1"}
    text = subprocess.run(["bash", ROOT / "runs/speedrun.sh"], env=os.environ | files, capture_output=True, text=True, check=True).stdout
    lines = [line.replace("bash runs/node.sh", "python train.py") for line in text.splitlines() if line.startswith(("python", "bash"))]
    assert [line.split()[1] for line in lines] == ["prepare.py", "train.py", "train.py", "finetune_lora.py", "rlhf.py", "rlhf.py", "quantize.py", "evaluate.py"]
    for line in lines:
        known = {field.name for field in fields(importlib.import_module(line.split()[1].removesuffix(".py")).Config)}
        assert set(re.findall(r"--(\w+)", line)) <= known, line
