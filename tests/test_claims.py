"""Numbers that take too long to measure in a test belong to today's defaults.

claims.json lists them: where they stand, the command that measures them, and the settings and functions that they depend on
(FILE.py:NAME, or FILE.py for a whole file), as a hash of the code without comments and docstrings. When one of these
changes, the test fails: run the command, put what it prints where the old number stood, then `python tests/test_claims.py WHAT`
records the new state. Numbers that are quick to measure are measured, in test_readme.py.
"""
import ast
import hashlib
import io
import json
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests/claims.json"


def plain_lines(text, tree):
    """The lines of a source, those of comments and docstrings empty: the same in every version of Python."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            first = node.body[0]
            lines[first.lineno - 1:first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
    return [line.rstrip() for line in lines]


def code_of(what):
    """The source of FILE.py:NAME, without comments and docstrings. Fields of a Config that only show or save are left out."""
    file, _, name = what.partition(":")
    text = (ROOT / file).read_text(encoding="utf-8")
    tree = ast.parse(text)
    lines = plain_lines(text, tree)
    if not name:
        return "\n".join(filter(None, lines))
    found = [node for node in tree.body if getattr(node, "name", None) == name
             or isinstance(node, ast.Assign) and any(getattr(target, "id", "") == name for target in node.targets)]
    assert len(found) == 1, f"{what}: {len(found)} definitions"
    for field in found[0].body if name == "Config" else ():
        if isinstance(field, ast.AnnAssign) and field.target.id in QUIET:
            lines[field.lineno - 1:field.end_lineno] = [""] * (field.end_lineno - field.lineno + 1)
    first = min([found[0].lineno, *(d.lineno for d in getattr(found[0], "decorator_list", ()))])
    return "\n".join(filter(None, lines[first - 1:found[0].end_lineno]))


QUIET = {"out", "wandb", "device", "log_every", "resume", "dry_run", "sample_every", "sample_tokens", "save_every", "page", "beside",
         "votes", "port", "host"}


def state_of(claim):
    return hashlib.sha256("\n".join(map(code_of, claim["depends"])).encode()).hexdigest()[:16]


def read(name):
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def test_every_number_stands_where_it_is_said_to():
    missing = [f"{claim['what']}: {text!r} is not in {name}" for claim in json.loads(LIST.read_text(encoding="utf-8"))
               for name, texts in claim["stands"].items() for text in texts if text not in read(name)]
    assert not missing, "\n".join(missing)


def test_nothing_changed_that_the_numbers_depend_on():
    stale = [f"{claim['what']}: {', '.join(claim['depends'])} changed since it was measured. Run: {claim['command']}"
             for claim in json.loads(LIST.read_text(encoding="utf-8")) if state_of(claim) != claim["state"]]
    assert not stale, "\n".join([*stale, "Then put the new numbers where the old ones stand, and run: python tests/test_claims.py WHAT"])


def test_a_change_of_a_default_is_seen(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text((ROOT / "train.py").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    claim = {"depends": ["train.py:Config"]}
    before, text = state_of(claim), (tmp_path / "train.py").read_text(encoding="utf-8")
    assert all(old in text for old in ("# peak rate of Muon", "log_every: Positive = 25", "muon_lr: Rate = 0.05"))
    (tmp_path / "train.py").write_text(text.replace("# peak rate of Muon", "# other words").replace("log_every: Positive = 25", "log_every: Positive = 9"),
                                       encoding="utf-8")
    assert state_of(claim) == before                               # comments and what only shows do not matter
    (tmp_path / "train.py").write_text(text.replace("muon_lr: Rate = 0.05", "muon_lr: Rate = 0.06"), encoding="utf-8")
    assert state_of(claim) != before


if __name__ == "__main__":
    claims = json.loads(LIST.read_text(encoding="utf-8"))
    unknown = set(sys.argv[1:]) - {claim["what"] for claim in claims}
    if unknown or not sys.argv[1:]:
        raise SystemExit(f"name what was measured again: {', '.join(repr(claim['what']) for claim in claims)}")
    for claim in claims:
        claim["state"] = state_of(claim) if claim["what"] in sys.argv else claim["state"]
    LIST.write_text(json.dumps(claims, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
