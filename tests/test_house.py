"""The rules of the house that a program can check: who imports whom, sizes, names, words, settings, no unsafe loading."""
import ast
import functools
import re
import subprocess
import sys

import pytest

from conftest import ROOT, run

ARROWS = {"bpe": set(), "model": set(), "prepare": {"bpe"}, "sample": {"bpe", "model"}, "train": {"bpe", "model", "sample"},
          "evaluate": {"bpe", "model", "sample"}, "quantize": {"bpe", "model"},
          "finetune_lora": {"bpe", "model", "sample", "quantize", "train"},
          "rlhf": {"bpe", "model", "sample", "train", "evaluate", "finetune_lora"},
          "serve": {"bpe", "model", "sample"}}
LATE = {("model", "bpe"), ("model", "finetune_lora"), ("model", "quantize")}              # imported inside load_model
STAGES = sorted(ARROWS)
ROOMS = ("data", "nanopath")
parse = functools.cache(ast.parse)
PAGES = {"bpe": 600, "model": 775, "prepare": 450, "sample": 802, "train": 482, "evaluate": 620, "quantize": 650,
         "finetune_lora": 800, "rlhf": 940, "serve": 610}
# lines. sample.py has five ways to decode, finetune_lora.py nine ways to learn, model.py 17 families, quantize.py seven
# methods, rlhf.py fifteen losses and serve.py a whole engine, each complete
# STYLE.md, "Words": what a reader who knows English as a second language has to look up
RIDDLES = r"\b(reckon\w*|lest|anew|mend(s|ed|ing)?|thereof|whoever|whence|hither|for good|goes on|go on|passed over)\b"


def source(stage):
    return (ROOT / f"{stage}.py").read_text(encoding="utf-8")


def pages():
    """All code of the house: (name, text)."""
    files = [*ROOT.glob("*.py"), *(path for room in (*ROOMS, "lessons") for path in (ROOT / room).glob("*.py"))]
    return [(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in sorted(files)]


def imports(tree, top=True):
    """(module, name) of what the body of a module imports, or of what is imported anywhere in it."""
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


def test_the_top_level_is_the_stages():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_stages_import_what_is_drawn(stage):
    tree = parse(source(stage))
    found = {module.split(".")[0] for module, _ in imports(tree, top=False)} & set(STAGES)
    assert {other for other in found if (stage, other) not in LATE} <= ARROWS[stage]
    assert {module.split(".")[0] for module, _ in imports(tree)} & set(STAGES) <= ARROWS[stage]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_takes_few_names_from_nanopath(stage):
    names = [name for module, name in imports(parse(source(stage)), top=False) if module.startswith("nanopath")]
    assert len(names) <= MOST_NAMES.get(stage, 16), names


MOST_NAMES = {"train": 21, "evaluate": 19, "model": 21, "finetune_lora": 40, "quantize": 31, "rlhf": 18, "serve": 18}


def test_nanopath_and_data_import_no_stage_but_the_tokenizer():
    for name, text in pages():
        if name.startswith(("data/", "nanopath/")):
            found = {module.split(".")[0] for module, _ in imports(parse(text), top=False)} & set(STAGES)
            assert found <= {"bpe"}, name


def test_text_needs_no_torch():
    for name, text in pages():
        if name.startswith("data/") and name != "data/shards.py":
            assert not any(module.split(".")[0] == "torch" for module, _ in imports(parse(text), top=False)), name


def test_functions_lines_and_pages_are_short():
    for name, text in pages():
        for node in ast.walk(parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 80, f"{name}:{node.lineno} {node.name} has {length} lines"
        for number, line in enumerate(text.splitlines(), 1):
            assert len(line) <= 120, f"{name}:{number} has {len(line)} characters"
        stage = name.removesuffix(".py")
        assert stage not in PAGES or len(text.splitlines()) <= PAGES[stage], f"{name} has {len(text.splitlines())} lines"


def test_the_training_loop_stands_on_one_screen():
    main = next(node for node in parse(source("train")).body if getattr(node, "name", "") == "main")
    loop = next(node for node in main.body if isinstance(node, ast.While))
    assert loop.end_lineno - loop.lineno + 1 <= 40
    text = source("train")
    assert text[:text.index(".backward()")].count("\n") < 300      # a reader reaches it within one file


def test_main_does_not_read_the_command_line():
    for stage in STAGES:
        for node in parse(source(stage)).body:
            if isinstance(node, ast.FunctionDef) and node.name == "main":
                assert "argv" not in ast.unparse(node), stage


def test_no_two_public_things_have_one_name():
    owners = {}
    for name, text in pages():
        if name.startswith("lessons/"):                            # a lesson is read alone, and writes out what it shows
            continue
        for node in parse(text).body:
            names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else \
                [target.id for target in node.targets if isinstance(target, ast.Name)] if isinstance(node, ast.Assign) else []
            for thing in names:
                if not thing.startswith("_") and thing not in ("Config", "main"):
                    owners.setdefault(thing, set()).add(name)
    assert {thing: sorted(where) for thing, where in owners.items() if len(where) > 1} == {}


def test_words_are_plain():
    for path in [*(ROOT / name for name, _ in pages()), *ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("*/*.sh")]:
        if ".venv" in path.parts:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not re.search(RIDDLES, line, re.I), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_of_config_is_read_and_explained(stage):
    text = source(stage)
    lines = text.splitlines()
    def lenders(text):
        return [source(f"{room}/{name}") for room, name in re.findall(r"^from (data|nanopath)\.(\w+) import", text, re.M)] + [
            source(name) for name in re.findall(r"^from (\w+) import", text, re.M) if name in STAGES]
    lent = "".join(page for first in lenders(text) for page in (first, *lenders(first)))
    settings = [node for node in parse(text).body if isinstance(node, ast.ClassDef) and node.name in ("Config", "Options")]
    assert settings
    for field in (field for node in settings for field in node.body):
        if isinstance(field, ast.AnnAssign):
            name = field.target.id
            around = lines[field.lineno - 1:field.end_lineno] + [lines[field.lineno - 2]]
            assert any("#" in line for line in around), f"{name}: no comment"
            assert re.search(rf"\b(cfg|o|options|self)\.{name}\b|known\.{name}\b", text + lent), f"{name}: never read"


def test_importing_is_silent_and_needs_no_arguments():
    """Each stage as if it were the first: the project's modules that another has loaded are forgotten."""
    code = f"""if True:
        import sys, torch
        for stage in {STAGES}:
            for name in [name for name in sys.modules if name.split(".")[0] in {(*STAGES, *ROOMS)}]:
                del sys.modules[name]
            __import__(stage)
            assert stage in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_every_comment(stage, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    done = run(ROOT / f"{stage}.py", "--help")
    comments = re.findall(r"^    \w+: .*?# (\w+ \w+)", source(stage).split("class Config")[1].split("\n\n\n")[0], re.M)
    assert len(comments) > 3
    assert [comment for comment in comments if comment not in done.stdout] == []


def test_no_unsafe_loading_and_every_text_file_has_an_encoding():
    for path in [*ROOT.glob("*.py"), *(path for folder in ROOT.iterdir() if folder.name not in ("tests", ".venv", "out", ".git")
                                       for path in folder.rglob("*.py"))]:
        relative = path.relative_to(ROOT)
        if ".venv" in relative.parts:
            continue
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(parse(text)):
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
