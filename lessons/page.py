"""
What every lesson stands on: small texts, a printed table, a picture and the command line. No lesson's idea is here.

A lesson is one page, run as `python -m lessons.NAME`: a docstring with the table that the run prints, a Config, and
main(cfg) -> the rows of that table (first the column names). tests/test_lessons.py runs each page and compares.
"""
import os
import re
import sys
from pathlib import Path

from nanopath.flags import nobody_reads, parse

ROOT = Path(__file__).resolve().parent.parent


def world_texts(split="train", count=None, size="quick", seed=0):
    """Documents of the tiny world (data/tinyworld.py), a list of strings: the same on every machine."""
    from data.tinyworld import make_world
    texts = [document.text for document in make_world(size, seed).documents[split]]
    return texts[:count]


def real_file(name):
    """A file or folder of real data in the folder that NANOPATH_DATA names, or None: every lesson also runs without."""
    folder = os.environ.get("NANOPATH_DATA")
    path = Path(folder, name) if folder else None
    return path if path and path.exists() else None


def table(rows):
    """Rows of cells -> text with aligned columns. Words stand left, numbers right. Floats get three decimals: a lesson
    that wants others formats the cell itself."""
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    right = [all(number_in(row[i]) is not None or row[i] in ("", "-") for row in cells[1:]) for i in range(len(widths))]
    return "\n".join("  ".join(f"{cell:>{width}}" if side else f"{cell:<{width}}"
                               for cell, width, side in zip(row, widths, right)).rstrip() for row in cells)


def number_in(cell):
    """'1,234', '12 %' or '-0.5' -> the number; None for words."""
    match = re.fullmatch(r"(-?[\d,]*\.?\d+(?:e-?\d+)?) ?%?", cell)
    return float(match[1].replace(",", "")) if match else None


def save_picture(figure, name, folder):
    """Write a matplotlib figure to folder/NAME.png, under a temporary name first. Returns the path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(folder / f"{name}.tmp.png", dpi=110)
    os.replace(folder / f"{name}.tmp.png", folder / f"{name}.png")
    return folder / f"{name}.png"


def new_figure(*shape, **options):
    """matplotlib's subplots, drawn into a file and not on a screen. Returns figure, axes."""
    import matplotlib                                              # slow to import, and only needed at the end
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(*shape, **options)


def run_lesson(main, Config, doc):
    """The command line of a lesson: flags -> main(cfg) -> its table and where its picture is. A mistake of the user
    (ValueError) ends with one line."""
    cfg, name = parse(Config, doc), Path(sys.argv[0]).stem
    try:
        print(table(main(cfg)))
        print(f"\nA picture of it: {Path(cfg.out, name)}.png. What to break, and the papers: the top of "
              f"lessons/{name}.py")
        sys.stdout.flush()
    except ValueError as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None                            # as a shell reports what Ctrl-C ended
    except BrokenPipeError:
        nobody_reads()
