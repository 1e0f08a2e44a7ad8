"""
The whole life of a language model on a laptop: ten stages on the tiny world, offline, and a report card at the end.

Run     python runs/path.py             # `make` runs this
        python runs/path.py --quick     # the same stages, smaller: they work, but learn little
You see one line per stage, with the time that is left; then out/report.md and out/report.html
Writes  data/tinyworld/; out/tinyworld, finetuned, merged, dpo, grpo, int4, evaluation; out/path/: what the stages print

A second run skips every stage that is done with the same command, script and input; an interrupted run continues. After
a change in another file delete out/path/done.json. --quick and the full path write into the same folders.
"""
import argparse
import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")                       # nothing here needs the network

from nanopath.files import read_json, write_json  # noqa: E402
from nanopath.report import write_report  # noqa: E402


@dataclass
class Stage:
    name: str
    command: str                    # what a user would type
    out: str                        # the file or folder that is there when the stage is done
    seconds: float                  # about how long it takes on two cores, for the time left of the stages after it


WORLD, MODELS = "data/tinyworld", "out/tinyworld out/merged out/dpo out/grpo out/int4"


def stages(quick):
    """The stages in their order."""
    def pick(full, small):
        return small if quick else full
    return [
        Stage("prepare", "python prepare.py tinyworld" + pick("", " --size=quick"), f"{WORLD}/meta.json", pick(5, 3)),
        Stage("pretrain", f"python train.py --dataset=tinyworld --max_steps={pick(1500, 150)}",
              "out/tinyworld/model.safetensors", pick(165, 45)),
        Stage("sample", "python sample.py --model=out/tinyworld --max_new_tokens=60 --seed=1", "", 5),
        Stage("fine-tune", "python finetune_lora.py --model=out/tinyworld --dataset=tinyworld"
              + pick("", " --max_steps=40"), "out/finetuned/adapter_model.safetensors", pick(90, 25)),
        Stage("merge", "python finetune_lora.py --merge=out/finetuned", "out/merged/model.safetensors", 4),
        Stage("dpo", "python rlhf.py dpo --model=out/merged --out=out/dpo" + pick("", " --max_steps=10 --eval_rows=20"),
              "out/dpo/model.safetensors", pick(25, 10)),
        Stage("grpo", "python rlhf.py grpo --model=out/merged --out=out/grpo"
              + pick("", " --max_steps=4 --eval_rows=20"), "out/grpo/model.safetensors", pick(70, 15)),
        Stage("quantize", f"python quantize.py --model=out/dpo --calibration={WORLD} --out=out/int4",
              "out/int4/model.safetensors", 12),
        Stage("evaluate", f"python evaluate.py --model {MODELS} --dataset=tinyworld"
              + pick("", " --limit=40 --eval_tokens=20000"), "out/evaluation/results.json", pick(100, 30)),
        Stage("serve", "python serve.py --model=out/int4", "", 10)]


def key_of(stage, before):
    """Changes with the command, the script and everything before it: then the stage runs again."""
    script = Path(stage.command.split()[1]).read_bytes()
    return hashlib.sha256(f"{before} {stage.command} ".encode() + script).hexdigest()


class Line:
    """The progress line: on a terminal one line that is rewritten, else a line when a stage begins and ends."""
    def __init__(self, stages):
        self.stages, self.live = stages, sys.stdout.isatty()

    def show(self, number, began, detail=""):
        left = max(0, self.stages[number].seconds - (time.monotonic() - began))
        left += sum(stage.seconds for stage in self.stages[number + 1:])
        stage = self.stages[number]
        if self.live:
            print(f"\r[{number + 1:2d}/{len(self.stages)}] {stage.name:10} {detail[:60]:60} "
                  f"about {int(left) // 60}:{int(left) % 60:02d} left", end="", flush=True)

    def end(self, number, words):
        name = self.stages[number].name
        words = f"{words:80}" if self.live else words              # covers the longer line that stood there
        print(("\r" if self.live else "") + f"[{number + 1:2d}/{len(self.stages)}] {name:10} {words}", flush=True)


def run_stage(stage, log, show, begun):
    """Run a stage with its output in a file. Returns its seconds; SystemExit with the end of the output if it fails.
    begun: this very stage was interrupted before; a training then continues from its newest checkpoint."""
    words, folder = stage.command.split()[1:], Path(stage.out).parent
    if begun and unfinished(folder):
        words = [*(word for word in words[:2] if not word.startswith("--")), "--resume", f"--out={folder}"]
    command = [sys.executable, *words]
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        # in a session of its own: Ctrl-C reaches it once, from us; a second one would stop it before it has saved
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while process.poll() is None:
                time.sleep(0.3)
                show(last_line(log))
        except BaseException:                                      # Ctrl-C: the stage saves what it has
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            process.wait(60)
            raise
    if process.returncode:
        text = log.read_text(encoding="utf-8", errors="replace")[-1500:]
        raise SystemExit(f"\n{text}\n{stage.name} failed: {stage.command}\nAll it printed: {log}. Run make again: it "
                         "continues here.")
    return time.monotonic() - began


def unfinished(folder):
    """Has the training in this folder a checkpoint to continue from?"""
    return (folder / "manifest.json").is_file() and any(folder.glob("state/step-*"))


def last_line(log):
    """The last thing that a stage printed, without control characters."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 400))
        lines = re.split(r"[\r\n]+", file.read().decode("utf-8", "replace").strip())
    return re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;]*m", "", lines[-1]))


def serve(stage, log, show):
    """Start the server, ask it one question as a client would, streamed, and stop it. Returns (seconds, what came)."""
    import socket

    import requests
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began, address = time.monotonic(), f"http://127.0.0.1:{port}"
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, *stage.command.split()[1:], f"--port={port}"]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while True:
            show("starts")
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"{address}/health", timeout=2).ok:
                    break
            if process.poll() is not None or time.monotonic() - began > 120:
                raise SystemExit(f"\n{log.read_text(encoding='utf-8')[-1500:]}\nserve failed: {stage.command}")
            time.sleep(0.2)
        ready, asked, first, text = time.monotonic(), "What is 23 + 31?", None, ""
        body = {"messages": [{"role": "user", "content": asked}], "stream": True, "temperature": 0, "max_tokens": 40}
        with requests.post(f"{address}/v1/chat/completions", json=body, stream=True, timeout=60) as reply:
            reply.raise_for_status()
            for line in reply.iter_lines(decode_unicode=True):
                if line.startswith("data: {"):
                    choices = json.loads(line[6:])["choices"]
                    piece = choices[0]["delta"].get("content") if choices else None
                    first = first or (time.monotonic() if piece else None)
                    text += piece or ""
        done = time.monotonic()
    finally:
        process.terminate()
        process.wait(60)
    return time.monotonic() - began, {"asked": asked, "answer": text, "ready": ready - began,
                                      "first": (first or done) - ready, "stopped": process.returncode}


def run_path(todo, quick=False):
    """Run the stages that are not done yet, in the current folder. Returns {stage: {"seconds", "command", ...}}."""
    folder = Path("out/path")
    folder.mkdir(parents=True, exist_ok=True)
    done = read_json(folder / "done.json") if (folder / "done.json").is_file() else {}
    line, key = Line(todo), str(quick)
    for number, stage in enumerate(todo):
        key, log = key_of(stage, key), folder / f"{number + 1:02d}-{stage.name}.log"
        if done.get(stage.name, {}).get("key") == key and (not stage.out or Path(stage.out).exists()):
            line.end(number, f"was done before, in {done[stage.name]['seconds']:.0f} s")
            continue
        began = time.monotonic()

        def show(detail):
            line.show(number, began, detail)
        if stage.name == "serve":
            seconds, more = serve(stage, log, show)
        else:
            before = done.get(stage.name, {})
            begun = before.get("begun") == key
            spent = before.get("spent", 0) if begun else 0         # by earlier calls that were interrupted
            done[stage.name] = {"begun": key, "spent": spent}
            write_json(folder / "done.json", done)
            try:
                seconds, more = spent + run_stage(stage, log, show, begun), {}
            except BaseException:
                done[stage.name]["spent"] += time.monotonic() - began
                write_json(folder / "done.json", done)
                raise
        done[stage.name] = {"key": key, "seconds": seconds, "command": stage.command, **more}
        write_json(folder / "done.json", done)
        line.end(number, f"{seconds:4.0f} s")
    return done


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller: about two minutes")
    quick = parser.parse_args().quick
    for name in ("SIGTERM", "SIGHUP"):                             # as Ctrl-C: the stage that runs saves and ends
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    os.chdir(ROOT)
    todo = stages(quick)
    try:
        write_report(Path("out"), todo, run_path(todo, quick), quick)
    except KeyboardInterrupt:
        raise SystemExit("\nstopped. Run the same command again: it continues here") from None
    print("The report card: out/report.html, or out/report.md\n"
          "Next: python sample.py --model=out/dpo --chat, or python serve.py --model=out/int4")


if __name__ == "__main__":
    main()
