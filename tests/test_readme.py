"""Every command of the README in a block without a language runs, but for bench/, in its order, in a copy of the project, as a
new user would type it."""
import ast
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from conftest import DATA, ROOT, run

HEAVY = ("bench/",)      # measurements that take minutes and another project's checkout
FORKED = ("sample.py", "model.py", "evaluate.py", "quantize.py")


def commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    return [line.split("    #")[0].strip() for line in lines
            if line.startswith(("python ", "torchrun ", "OMP_NUM_THREADS=1 torchrun ")) and not any(word in line for word in HEAVY)]


def test_readme_commands_run_as_written(tmp_path):
    if not (DATA / "tinyshakespeare.txt").is_file():
        pytest.skip("the README trains on Shakespeare; there is no copy in NANOPATH_DATA")
    pytest.importorskip("transformers")
    project = tmp_path / "nanopath"
    shutil.copytree(ROOT, project, ignore=lambda folder, names: [name for name in names if name in (".git", ".venv", "out")
                    or folder == str(ROOT / "data") and not name.endswith((".py", ".md"))])
    environment = {**os.environ, "NANOPATH_DATA": str(DATA), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                   "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}
    listed = commands()
    assert len(listed) >= 20
    printed = {}
    for command in listed:
        words = shlex.split(command)
        if words[1] in FORKED and "*" not in command:              # with this checkout's modules: their imports take longest
            done = run(*words[1:], cwd=project, check=False)
        else:
            done = subprocess.run(command, shell=True, cwd=project, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        printed[command] = done.stdout
    assert (project / "out/shakespeare/loss.png").is_file()
    assert not list(project.rglob("*.tmp"))

    readme = (ROOT / "README.md").read_text(encoding="utf-8")      # its numbers are those of these very runs
    claimed = float(re.search(r"After 100 steps the validation loss is about ([\d.]+) bits per byte", readme)[1])
    measured = float(re.search(r"validation .* ([\d.]+) bits per byte", printed["python train.py --max_steps=100"])[1])
    assert abs(claimed - measured) < 0.03
    parameters, rates = re.search(r"The model has ([\d,]+) parameters", readme)[1], re.search(r"peak rates: .*", readme)[0]
    assert f"{parameters} parameters on shakespeare" in printed["python train.py --max_steps=100"]
    assert rates in printed["python train.py --dry_run"]
    per_token = re.search(r"bytes per token \(here ([\d.]+)\)", readme)[1]
    assert f"{per_token} bytes per token" in printed["python prepare.py shakespeare --vocab_size=512"]
    summary = subprocess.run([sys.executable, "model.py", "--summary=llama3-70b"], cwd=project, env=environment, capture_output=True, text=True)
    folders = (ROOT / "docs/05-folders.md").read_text(encoding="utf-8")
    assert summary.stdout.strip() == re.search(r"^llama3-70b: .*?^```", folders, re.M | re.S)[0].removesuffix("```").strip()
    sizes = subprocess.run([sys.executable, "bpe.py", str(DATA / "tinyshakespeare.txt"), "--vocab_size=4096", "--report", "--out=out/t"],
                           cwd=project, env=environment, capture_output=True, text=True).stdout
    assert re.search(r"4,096 tokens:\s+([\d.]+) bytes", readme)[1] in next(line for line in sizes.splitlines() if line.split()[:1] == ["4096"])


def test_the_loop_is_as_long_as_the_readme_says():
    main = next(node for node in ast.parse((ROOT / "train.py").read_text(encoding="utf-8")).body if getattr(node, "name", "") == "main")
    loop = next(node for node in main.body if isinstance(node, ast.While))
    assert f"The loop is {loop.end_lineno - loop.lineno + 1} lines" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_loss_of_the_readme_is_that_of_the_results():
    """The loss of the whole demo is too long for a test; it stands in two places, which must agree."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    results = (ROOT / "bench/results.md").read_text(encoding="utf-8")
    bits, nats = re.search(r"Its ([\d.]+) bits per byte are ([\d.]+) nats", readme).groups()
    assert readme.count(bits) == 2 and f"{bits} bits per byte" in results and f"{nats} over the whole validation text" in results


def test_every_file_the_readme_names_exists():
    for page in [ROOT / "README.md", ROOT / "lessons/README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        named = set(re.findall(r"\b((?:[\w-]+/)*[\w-]+\.(?:py|sh|md|yaml))\b", text)) - {"FILE.py"}
        for file, name in re.findall(r"`([\w/]+\.py)` \(`(\w+)`", text):
            assert re.search(rf"\b(def|class) {name}\b", (ROOT / file).read_text(encoding="utf-8")), f"{page.name}: {name}"
        missing = [name for name in named if not (ROOT / name).is_file() and not (page.parent / name).is_file()]
        assert missing == [], page
        for name in re.findall(r"\]\(([^)#:]+)\)", text):         # links to files of the project
            assert (page.parent / name).exists(), f"{page.name}: {name}"


def test_every_chapter_has_its_parts():
    """README: ten chapters; each has its second half in docs/, with the same parts, and three things to break."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    chapters = re.findall(r"^### (\d+)\. (.*)$", readme, re.M)
    pages = sorted((ROOT / "docs").glob("[0-9]*.md"))
    assert [int(number) for number, _ in chapters] == list(range(1, 11)) == [int(page.name[:2]) for page in pages]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert f"](docs/{page.name})" in readme
        parts = re.findall(r"^## (.*)$", text, re.M)
        assert parts[-5:] == ["Read the file in this order", "Deliverable", "Break it on purpose", "Exercises", "Papers"], page
        broken = text.split("## Break it on purpose")[1].split("## Exercises")[0].split("|---|---|---|")[1].strip().splitlines()
        assert len(broken) == 3 and all(len(row.strip("| ").split(" | ")) == 3 for row in broken), page
        for name in re.findall(r"`(\w+)`", text.split("## Read the file")[1].split("## Deliverable")[0]):
            assert re.search(rf"\b(def|class) {name}\b|^{name} = ", CODE, re.M), f"{page.name}: {name}"


CODE = "\n".join(path.read_text(encoding="utf-8") for folder in (".", "nanopath", "data") for path in (ROOT / folder).glob("*.py"))
