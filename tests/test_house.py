"""The rules of the house that a program can check: who imports whom, every setting used and explained, no unsafe loading."""
import ast
import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT

ARROWS = {"bpe": set(), "model": set(), "prepare": {"bpe"}, "sample": {"bpe", "model"},
          "train": {"bpe", "model", "sample"}}
STAGES = sorted(ARROWS)
COMMANDS = STAGES


def source(stage):
    return (ROOT / f"{stage}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("stage", STAGES)
def test_imports_follow_the_arrows(stage):
    """At the top of the file; load_model alone may import the tokenizer late."""
    imported = set()
    for node in ast.parse(source(stage)).body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported & set(STAGES) <= ARROWS[stage]
    assert not (ROOT / "data" / f"{stage}.py").exists()


def test_what_stages_stand_on_imports_none_but_the_tokenizer():
    for path in [*(ROOT / "data").glob("*.py"), *(ROOT / "nanopath").glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        assert names & set(STAGES) <= {"bpe"}, path


@pytest.mark.parametrize("stage", COMMANDS)
def test_every_field_of_config_is_read_and_explained(stage):
    text = source(stage)
    config = next(node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == "Config")
    lines = text.splitlines()
    lent = "".join(source(f"{room}/{name}") for room, name in re.findall(r"^from (data|nanopath)\.(\w+) import", text, re.M))
    for field in config.body:
        if isinstance(field, ast.AnnAssign):
            name = field.target.id
            assert "#" in lines[field.lineno - 1] or lines[field.lineno - 2].strip().startswith("#"), f"{name}: no comment"
            assert re.search(rf"\bcfg\.{name}\b|known\.{name}\b", text + lent), f"{name}: never read"


@pytest.mark.parametrize("stage", STAGES)
def test_importing_is_silent_and_needs_no_arguments(stage):
    done = subprocess.run([sys.executable, "-c", f"import {stage}"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("stage", COMMANDS)
def test_help_shows_every_comment(stage):
    done = subprocess.run([sys.executable, ROOT / f"{stage}.py", "--help"], capture_output=True, text=True, encoding="utf-8",
                          env={**os.environ, "COLUMNS": "300"})
    comments = re.findall(r"^    \w+: .*?# (\w+ \w+)", source(stage).split("class Config:")[1].split("\n\n\n")[0], re.M)
    assert done.returncode == 0 and len(comments) > 3
    assert [comment for comment in comments if comment not in done.stdout] == []


def test_no_unsafe_loading_and_every_text_file_has_an_encoding():
    for path in ROOT.rglob("*.py"):
        relative = path.relative_to(ROOT)
        if relative.parts[0] in ("tests", ".venv", "out") or ".venv" in relative.parts:
            continue
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                owner = ast.unparse(node.func)
                assert owner not in ("eval", "exec", "pickle.load", "pickle.loads"), f"{relative}:{node.lineno}"
                if name in ("read_text", "write_text"):
                    assert any(k.arg == "encoding" for k in node.keywords), f"{relative}:{node.lineno}: no encoding"
                if owner == "open":
                    mode = next((k.value for k in node.keywords if k.arg == "mode"), node.args[1] if len(node.args) > 1 else None)
                    binary = isinstance(mode, ast.Constant) and "b" in mode.value or "b" in ast.unparse(mode or ast.Constant(""))
                    assert binary or any(k.arg == "encoding" for k in node.keywords), f"{relative}:{node.lineno}: no encoding"
