"""
What quantization costs and saves: loss with an interval, distance to the original model, memory, tokens per second; the
table and the plot of `python quantize.py --compare`.
"""
import json
import math
import os
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from nanopath.devices import free_memory, memory_used

MEASURES = {"bits": ("bits/weight", "{:.3f}"), "size": ("file MB", "{:,.1f}"), "memory": ("peak MB", "{:,.0f}"),
           "loss": ("loss", "{:.4f}"), "interval": ("+-", "{:.4f}"), "kl": ("KL", "{:.5f}"),
           "top1": ("same top 1", "{:.2%}"), "speed1": ("tok/s", "{:,.1f}"), "speed32": ("tok/s x 32", "{:,.1f}")}


def window_losses(model, ids, rows=4):
    """The mean loss of each row of ids (R, T + 1)."""
    return torch.cat([model(part[:, :-1], part[:, 1:], reduction="none").double().mean(dim=1)
                      for part in ids.split(rows)])


def mean_and_interval(losses):
    """The mean, and 1.96 standard errors of it: a 95 % interval if windows are independent."""
    return losses.mean().item(), 1.96 * losses.std().item() / math.sqrt(len(losses))


def distance(model, original, ids, rows=4):
    """(mean over tokens of KL(p || p'), share of tokens whose likeliest next token is the same): p is the original."""
    total, same, count = 0.0, 0, 0
    for part in ids.split(rows):
        p, q = (each(part).log_softmax(dim=-1) for each in (original, model))
        total += F.kl_div(q, p, log_target=True, reduction="none").sum(dim=-1).double().sum().item()
        same += (p.argmax(dim=-1) == q.argmax(dim=-1)).sum().item()
        count += part.numel()
    return total / count, same / count


def tokens_per_second(model, cache, ids, batch, new=32):
    """Greedy tokens of `batch` rows together after a prompt from ids. cache(batch, size) makes a KVCache."""
    size = min(ids.shape[1], model.config.block_size)
    new, length = min(new, size // 2), min(64, size - min(new, size // 2))
    prompt, kv = ids[torch.arange(batch) % len(ids), :length], cache(batch, length + new)
    last = model(prompt, cache=kv, last=True).argmax(dim=-1)[:, None]
    last = model(last, cache=kv, last=True).argmax(dim=-1)[:, None]                      # warm up
    wait(last.device)
    begun = time.perf_counter()
    for _ in range(new - 1):
        last = model(last, cache=kv, last=True).argmax(dim=-1)[:, None]
    wait(last.device)
    return batch * (new - 1) / (time.perf_counter() - begun)


def wait(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


@torch.inference_mode()
def measure_model(model, ids, cache, load_original):
    """A row of the table, except its sizes. ids (R, T): text that no method was calibrated on. The original model is
    loaded last, so that the peak memory is that of this model alone."""
    device = model.embed_tokens.weight.device
    model, ids = model.eval().pack(), ids.to(device)
    loss, interval = mean_and_interval(window_losses(model, ids))
    speeds = {f"speed{batch}": tokens_per_second(model, cache, ids, batch) for batch in (1, 32)}
    memory = memory_used(device) / 1e6
    free_memory(device)
    kl, top1 = distance(model, load_original().eval().pack(), ids)
    return dict(memory=memory, loss=loss, interval=interval, kl=kl, top1=top1, **speeds)


def run_methods(script, name, out, variants, shared):
    """{method: row of measures}. For each of variants {method: flags, or None: the model as it is} one process of the
    script quantizes the model `name` into a folder under out, another measures the folder and prints JSON."""
    rows = {}
    for label, flags in variants.items():
        folder = name if flags is None else out / label.replace(" ", "-")
        commands = [] if flags is None else [[f"--model={name}", f"--out={folder}", *flags]]
        for command in [*commands, [f"--compare={name}", f"--model={folder}"]]:
            done = subprocess.run([sys.executable, script, *command, *shared], capture_output=True, text=True,
                                  encoding="utf-8", env=os.environ | {"PYTHONUTF8": "1"})
            if done.returncode:
                last = (done.stderr.strip() or f"ended by signal {-done.returncode}: out of memory?").splitlines()[-1]
                raise SystemExit(f"--compare={name}: {label}: {last}")
        rows[label] = json.loads(done.stdout.splitlines()[-1])
    return rows


def show_table(rows, path):
    """Print {method: row of measures}, and plot KL and speed against the size of the file."""
    rows = {name: row | {"size": row["size"] / 1e6} for name, row in rows.items()}
    cells = [["method", *(head for head, _ in MEASURES.values())]]
    cells += [[name, *(form.format(row[key]) for key, (_, form) in MEASURES.items())] for name, row in rows.items()]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    for line in cells:
        print("  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]))
    import matplotlib                                              # slow to import, and only needed here
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, key, label in zip(axes, ("kl", "speed1"), ("KL to the original, nats per token", "tokens per second")):
        for number, (name, row) in enumerate(rows.items()):
            if row[key] > 0:                                       # the KL of the original to itself is 0: no logarithm
                axis.plot(row["size"], row[key], "os^vDP*Xph"[number % 10], color=f"C{number % 10}", label=name)
        axis.set(xlabel="size of the file, MB", ylabel=label, yscale="log" if key == "kl" else "linear")
        axis.grid(alpha=0.3)
    axes[1].legend(bbox_to_anchor=(1.02, 1), loc="upper left")     # of all methods, also the original
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.tmp.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    os.replace(temporary, path)
    print(f"plotted     {path}")
