"""
The report card of runs/path.py: per stage what went in, what came out, what it cost and what it changed; one dialogue
before and after. out/report.md is plain Markdown, out/report.html one file with its pictures inside.
"""
import base64
import html
import json
from pathlib import Path

from nanopath.files import read_json, replace_file
from nanopath.run import log_rows

IDEAS = {
    "prepare": "A small world is drawn from a seed and told in short texts. The tokenizer is learnt from them.",
    "pretrain": "A GPT learns to predict the next token. So it learns the facts of the world, and to add.",
    "sample": "Tokens are drawn one after the other from its predictions. It continues texts; it does not answer.",
    "fine-tune": "Thin matrices beside the weights (LoRA) learn from questions with answers.",
    "merge": "The thin matrices become part of the weights: a plain model again.",
    "dpo": "Pairs of a better and a worse answer teach what people prefer: terse answers, and no secrets.",
    "grpo": "The model tries each task eight times. Tries that were rewarded more than the others become likelier.",
    "quantize": "Weights become 4-bit integers. GPTQ corrects the errors of earlier columns in later ones.",
    "evaluate": "Held-out questions with exact answers, and the loss of held-out text, for every model of the path.",
    "serve": "A server answers a client of OpenAI's protocol token by token, and stops when it is told to."}
NEXT = {
    "prepare": "python prepare.py my_notes/ --vocab_size=2048",
    "pretrain": "python train.py --dataset=tinyworld --max_steps=4000",
    "sample": "python sample.py --model=out/tinyworld --top_k=50 --show_probs",
    "fine-tune": "python finetune_lora.py --rank=2",
    "dpo": "python rlhf.py judge --model=out/dpo --other=out/merged",
    "grpo": "python rlhf.py grpo --model=out/merged --reward=style --gold=grade",
    "quantize": "python quantize.py --compare=out/dpo",
    "evaluate": "python evaluate.py --model out/merged out/dpo --tasks=data/tinyworld/tasks_test.jsonl",
    "serve": "python serve.py --model=out/dpo"}
PICTURES = {"pretrain": "tinyworld/loss.png", "fine-tune": "finetuned/loss.png", "grpo": "grpo/rewards.png",
            "evaluate": "evaluation/results.png"}


def first_last(out, key):
    """The first and the last value of a quantity in a run's log."""
    values = [row[key] for row in log_rows(out) if key in row]
    return (values[0], values[-1]) if values else (float("nan"), float("nan"))


def size_of_file(path):
    return f"{path.stat().st_size / 1e6:.2f} MB"


def speed(out):
    rows = [row for row in log_rows(out) if "tokens" in row and "seconds" in row]
    spent = rows[-1]["seconds"] - rows[0]["seconds"] if len(rows) > 1 else 0
    return f"{sum(row['tokens'] for row in rows[1:]) / spent:,.0f} tokens per second" if spent > 0 else ""


def facts(out, done):
    """{stage: what it changed, in words with numbers}, read from what the stages have written."""
    meta, world = (read_json(Path("data/tinyworld", name)) for name in ("meta.json", "world.json"))
    train = meta["splits"]["train"]
    before, after = first_last(out / "tinyworld", "loss")[0], first_last(out / "tinyworld", "val_loss")[1]
    found = {
        "prepare": f"{train['documents']:,} documents, {train['bytes'] / 1e6:.1f} MB -> {train['tokens']:,} tokens, a "
                   f"vocabulary of {meta['vocab_size']}, {train['bytes'] / train['tokens']:.2f} bytes per token",
        "pretrain": f"loss {before:.2f} at the first step; at the end {after:.3f} nats per token on held-out text, "
                    f"where a perfect model has {world['floor']['nats_per_token']:.3f}. {speed(out / 'tinyworld')}, "
                    f"{size_of_file(out / 'tinyworld/model.safetensors')}"}
    for stage, folder, what in (("dpo", "dpo", "preferred answers"), ("grpo", "grpo", "tasks")):
        values = [row["val_reward"] for row in log_rows(out / folder) if "val_reward" in row]
        found[stage] = f"held-out {what} right and terse: {values[0]:.1%} -> {max(values):.1%}. {speed(out / folder)}"
    before, after = first_last(out / "dpo", "val_accuracy")
    found["dpo"] += f". The better answer of a pair is the likelier one, more than before: {before:.1%} -> {after:.1%}"
    found["merge"] = "two files of the adapter and a base -> one folder that needs neither"
    before, after = first_last(out / "finetuned", "loss")[0], first_last(out / "finetuned", "val_loss")[1]
    adapter = size_of_file(out / "finetuned/adapter_model.safetensors")
    found["fine-tune"] = f"loss of answers {before:.2f} at the first step, {after:.3f} at the end, held out. " \
                         f"{speed(out / 'finetuned')}, {adapter}"
    before, after = (size_of_file(out / name / "model.safetensors") for name in ("dpo", "int4"))
    found["sample"] = (out / "path/03-sample.log").read_text(encoding="utf-8").split("\n\n")[0].strip()[:400]
    found["quantize"], served = f"{before} -> {after}", done["serve"]
    found["serve"] = (f"ready in {served['ready']:.1f} s, first token after {served['first'] * 1000:.0f} ms; asked "
                      f"{served['asked']!r} it answered {served['answer']!r}; exit code {served['stopped']}")
    return found


def scores(out):
    """[(model, loss, exact answers with interval)], and of the question to which the models gave the most different
    answers (question, [(model, answer)])."""
    rows = read_json(out / "evaluation/results.json")["scores"]
    models = list(dict.fromkeys(row["model"] for row in rows))

    def of(model, metric):
        return next((row for row in rows if row["model"] == model and row["metric"] == metric), None)
    table = []
    for model in models:
        loss, exact = of(model, "loss (nats per token)"), of(model, "exact")
        shown = [f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" if row else "" for row in (loss, exact)]
        table.append((model, *shown))
    asked = {}
    for line in (out / "evaluation/items.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("written"):
            question = row["prompts"][0].removeprefix("Question: ").split("\n")[0]
            asked.setdefault(question, []).append((row["model"], row["written"][0].strip()[:100]))
    whole = [item for item in asked.items() if len(item[1]) == len(models)]
    return table, max(whole, key=lambda item: len({text for _, text in item[1]}), default=("", []))


def write_report(out, stages, done, quick):
    """out/report.md and out/report.html. done: {stage: {"seconds", "command", ...}} of runs/path.py."""
    found, (table, (question, dialogue)) = facts(out, done), scores(out)
    total = sum(done[stage.name]["seconds"] for stage in stages)
    small = " (quick: every stage works, but the models have learnt little)" if quick else ""
    blocks = [("h1", "The life of a language model"),
              ("p", f"{len(stages)} stages on the tiny world, {total / 60:.1f} minutes{small}.")]
    for number, stage in enumerate(stages, 1):
        record = done[stage.name]
        blocks.append(("h2", f"{number}. {stage.name}: {record['seconds']:.0f} s"))
        blocks += [("p", text) for text in (IDEAS.get(stage.name), found.get(stage.name)) if text]
        blocks.append(("code", record["command"]))
        if stage.name in PICTURES and (out / PICTURES[stage.name]).is_file():
            blocks.append(("picture", PICTURES[stage.name]))
        if stage.name == "evaluate":
            blocks.append(("table", [("model", "loss of held-out text", "exact answers"), *table]))
        if stage.name in NEXT:
            blocks.append(("p", f"Next: `{NEXT[stage.name]}`"))
    blocks.append(("h2", "One question, before and after"))
    blocks.append(("table", [("model", f"asked: {question}"), *dialogue]))
    replace_file(out / "report.md", "\n\n".join(as_markdown(*block) for block in blocks) + "\n")
    replace_file(out / "report.html", REPORT % "\n".join(as_html(out, *block) for block in blocks))


def as_markdown(kind, content):
    if kind == "table":
        head, *rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in content]
        return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
    forms = {"h1": "# {}", "h2": "## {}", "p": "{}", "code": "```\n{}\n```", "picture": "![{0}]({0})"}
    return forms[kind].format(content)


def as_html(out, kind, content):
    if kind == "table":
        rows = ["<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
                for row, tag in zip(content, ["th"] + ["td"] * len(content))]
        return "<table>" + "".join(rows) + "</table>"
    if kind == "picture":
        data = base64.b64encode((out / content).read_bytes()).decode()
        return f'<img alt="{html.escape(content)}" src="data:image/png;base64,{data}">'
    before, _, rest = html.escape(content).partition("`")
    code, _, after = rest.partition("`")
    inner = f"{before}<code>{code}</code>{after}" if code else before
    return f"<pre>{inner}</pre>" if kind == "code" else f"<{kind}>{inner}</{kind}>"


REPORT = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>nanopath: the life of a language model</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.5rem; border-top: 1px solid #8884; padding-top: 1rem }
pre, code { font: 14px/1.4 ui-monospace, monospace; background: #8882; border-radius: 4px }
pre { padding: .6rem .8rem; overflow-x: auto } code { padding: .1rem .3rem }
table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { border: 1px solid #8886; padding: .3rem .6rem; text-align: left }
img { max-width: 100%%; background: #fff; border-radius: 4px }
</style></head><body>
%s
</body></html>
"""
