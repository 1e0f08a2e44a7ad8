"""
The same stage with several settings, each run in a process of its own: a table and a plot of what they cost and reach.

A process of its own, so that the largest memory is that of one setting, and one that fails leaves the others alone.
"""
import math
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

from nanopath.finetuning import READ_BY
from nanopath.files import read_json, write_json
from nanopath.run import log_rows, stage_of

COLUMNS = {"trained": "{:>11,}", "share": "{:>7.2%}", "memory": "{:>7.2f}", "seconds": "{:>6.0f}", "loss": "{:>7.4f}",
           "score": "{:>6.3f}", "forgot": "{:>+8.4f}"}
HEADS = {"trained": "numbers", "share": "share", "memory": "GB", "seconds": "s", "loss": "loss", "score": "exact",
         "forgot": "forgot"}


def flags_of(cfg, **changes):
    """The flags that make this Config, except for some changes."""
    found = []
    for field in fields(cfg):
        value = changes.get(field.name, getattr(cfg, field.name))
        if isinstance(value, (tuple, list)):
            found += [f"--{field.name}", *map(str, value)] if list(value) != list(field.default) else []
        elif value != field.default:
            found.append(f"--{field.name}" if value is True else f"--no-{field.name}" if value is False
                         else f"--{field.name}={value}")
    return found


def run_variants(cfg, name, values, changes):
    """Run the stage of cfg once for each value of its flag `name`, in <out>/<value>/, with other flags changed to
    changes(value). Yields (value, folder, error)."""
    script = Path(sys.modules[cfg.__module__].__file__)
    for value in values:
        out = Path(cfg.out) / str(value)
        command = [sys.executable, script, *flags_of(cfg, out=str(out), **{name: value}, **changes(value))]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8",
                              env=os.environ | {"PYTHONUTF8": "1"})
        last = (done.stderr.strip() or f"ended by signal {-done.returncode}: out of memory?").splitlines()[-1]
        yield value, out, last if done.returncode else ""


def exact_score(folder, questions, device="auto"):
    """Share of exact answers to a file of questions, asked by evaluate.py; where that fails, NaN and a line."""
    script = Path(sys.modules["nanopath"].__file__).parent.parent / "evaluate.py"
    out = folder / "evaluation"
    done = subprocess.run([sys.executable, script, f"--model={folder}", f"--tasks={questions}", f"--out={out}",
                           f"--device={device}"], capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        print(f"evaluate.py --model={folder} failed: {done.stderr.strip()[-200:]}", file=sys.stderr)
        return math.nan
    scores = read_json(out / "results.json")["scores"]
    return next(row["value"] for row in scores if row["metric"] == "exact")


def row_of(out, questions, device="auto"):
    """What a finished fine-tuning cost and reached, from its log."""
    rows = log_rows(out)
    first = next(row for row in rows if "trained" in row)
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    after = next((row["base_loss_after"] for row in reversed(rows) if "base_loss_after" in row), math.nan)
    return dict(trained=first["trained"], share=first["trained"] / first["parameters"],
                memory=max(row.get("memory", 0) for row in rows) / 1e9,
                seconds=max(row.get("seconds", 0) for row in rows), loss=min(losses, default=math.nan),
                score=exact_score(out, questions, device) if questions else math.nan,
                forgot=after - first["base_loss"] if first["base_loss"] is not None else math.nan)


def compare_methods(cfg):
    """--compare: every method of --methods with the same settings. Writes <out>/comparison.json and .png."""
    places = [Path(cfg.dataset or "tinyworld"), Path("data") / (cfg.dataset or "tinyworld")]
    questions = [place / "questions_test.jsonl" for place in places]
    questions = next((path for path in questions if path.is_file()), None)
    cfg = replace(cfg, out="out/compared" if cfg.out == type(cfg).out else cfg.out)
    found, out = {}, Path(cfg.out)
    width = max(map(len, cfg.methods))
    heads = [f"{HEADS[name]:>{len(form.format(0))}}" for name, form in COLUMNS.items()]
    print(f"{'method':{width}}  " + "  ".join(heads))

    def changes(method):
        """Flags that a method does not read get their defaults."""
        unread = {flag: getattr(type(cfg), flag) for flag, methods in READ_BY.items() if method not in methods}
        return unread | dict(compare=False, methods=type(cfg).methods)
    for method, folder, error in run_variants(cfg, "method", cfg.methods, changes):
        if error:
            print(f"{method:{width}}  {error[:100]}", flush=True)
            continue
        found[method] = row_of(folder, questions, cfg.device)
        print(f"{method:{width}}  " + "  ".join(form.format(found[method][name]) for name, form in COLUMNS.items()),
              flush=True)
    if not found:
        raise SystemExit(f"{stage_of(cfg)} --compare: no method could be run")
    write_json(out / "comparison.json", found)
    plot_methods(found, out / "comparison.png")
    print(f"Written to {out}/: comparison.json, comparison.png, and a folder for each method\n"
          f"Next: python evaluate.py --model {' '.join(f'{out}/{name}' for name in list(found)[:2])}")


def plot_methods(found, path):
    """Loss (or exact answers, where there are some) and forgetting against the count of learnt numbers."""
    import matplotlib                                              # slow to import, and only needed here
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    scored = not any(math.isnan(row["score"]) for row in found.values())
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for axis, (name, label) in zip(axes, (("score", "exact answers") if scored else ("loss", "validation loss"),
                                          ("forgot", "loss on the text of pretraining, change"))):
        for method, row in found.items():
            axis.scatter(row["trained"], row[name])
            axis.annotate(method, (row["trained"], row[name]), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axis.set(xlabel="numbers learnt", ylabel=label, xscale="log")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    temporary = path.with_name("comparison.tmp.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    os.replace(temporary, path)
