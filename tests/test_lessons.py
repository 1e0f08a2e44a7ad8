"""The form of every lesson: its page, its table as its docstring shows it, its picture, its flags. What a lesson computes is
held against a library in tests/test_lesson_NAME.py."""
import ast
import importlib
import re

import pytest

from conftest import ROOT, run
from lessons.page import number_in, table

NAMES = sorted(path.stem for path in (ROOT / "lessons").glob("*.py") if path.stem not in ("page", "encoder"))
# lesson -> relative; else 10 %. Columns of seconds are only held to a factor of 10
TOLERANCE = {"foundations": 0.02, "networks": 0.02, "ngram": 0.001, "attention": 0.05, "long_texts": 0.05, "subwords": 0.02,
             "published": 0.001, "bert": 0.05, "labels": 0.15}


def page_of(name):
    return (ROOT / "lessons" / f"{name}.py").read_text(encoding="utf-8")


def documented(name, header):
    """The rows of the table in the docstring: the lines from that with the header's first and last name to a blank."""
    lines = ast.get_docstring(ast.parse(page_of(name)), clean=True).splitlines()
    start = next(i for i, line in enumerate(lines) if re.split(r"\s{2,}", line.strip()) == header)
    end = next((i for i in range(start, len(lines)) if not lines[i].strip()), len(lines))
    return [re.split(r"\s{2,}", line.strip()) for line in lines[start:end]]


def split(rows):
    return [re.split(r"\s{2,}", line.strip()) for line in table(rows).splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_shows_the_table_that_the_page_prints(name, tmp_path):
    lesson = importlib.import_module(f"lessons.{name}")
    found = split(lesson.main(lesson.Config(out=str(tmp_path))))
    shown = documented(name, found[0])
    assert [row[0] for row in shown] == [row[0] for row in found]
    for row, other in zip(shown[1:], found[1:]):
        assert len(row) == len(other), (row, other)
        for title, cell, measured in zip(found[0], row, other):
            a, b = number_in(cell), number_in(measured)
            if a is None or b is None:
                assert cell == measured, (title, row, other)
            elif re.search(r"\bs\b|seconds", title):
                assert b <= 10 * a + 1, (title, row, other)
            else:
                smallest = 10.0 ** -len(cell.partition(".")[2].rstrip(" %"))        # one of the last digit shown
                assert abs(a - b) <= TOLERANCE.get(name, 0.1) * abs(a) + smallest, (title, row, other)
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", NAMES)
def test_a_quick_run_prints_a_table_and_draws_a_picture(name, tmp_path):
    done = run("-m", f"lessons.{name}", "--quick", f"--out={tmp_path}", cwd=ROOT, timeout=60)
    assert len(done.stdout.splitlines()) >= 4 and not done.stderr
    assert (tmp_path / f"{name}.png").exists() and not (tmp_path / f"{name}.tmp.png").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_flag_is_one_line(name):
    done = run("-m", f"lessons.{name}", "nonsense", cwd=ROOT, check=False)
    assert done.returncode and len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_its_parts(name):
    doc = ast.get_docstring(ast.parse(page_of(name)))
    for part in ("Run", "You see", "Deliverable", "Break it", "Papers"):
        assert re.search(rf"^{part}\b", doc, re.M), f"{name}: no {part}"
    assert len(set(re.findall(r"--break_\w+|--\w+(?:=\S+)?", doc.split("Break it")[1].split("Papers")[0]))) >= 2
    assert len(page_of(name).splitlines()) <= 330


def test_the_index_lists_every_lesson():
    index = (ROOT / "lessons" / "README.md").read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"`(\w+)\.py`", index)) - {"page", "encoder"}) == NAMES


def test_nothing_imports_a_lesson():
    for path in [*ROOT.glob("*.py"), *(ROOT / "nanopath").glob("*.py"), *(ROOT / "data").glob("*.py")]:
        assert not re.search(r"^\s*(from|import) lessons", path.read_text(encoding="utf-8"), re.M), path


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_imports_only_what_it_may(name):
    allowed = {"bpe", "model", "sample", "data", "nanopath", "lessons"}
    own = {path.stem for path in ROOT.glob("*.py")} | {"data", "nanopath", "lessons"}
    for node in ast.walk(ast.parse(page_of(name))):
        modules = [node.module] if isinstance(node, ast.ImportFrom) else \
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            assert module.split(".")[0] not in own - allowed, module
            assert not module.startswith("lessons.") or module in ("lessons.page", "lessons.encoder"), "a lesson imports no lesson"
