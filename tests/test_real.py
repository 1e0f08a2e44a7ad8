"""A published model, SmolLM2-135M-Instruct, end to end: the text that sample.py writes is what transformers writes."""
import pytest
import torch
from conftest import ROOT, real_folder, run

from data.templates import answer_ends
from model import load_model
from sample import generate

PROMPTS = [
    "The capital of France is", "Once upon a time", "def fibonacci(n):\n", "1, 2, 3, 4,", "Water boils at", "Dear Sir or Madam,",
    "The largest planet in the solar system", "import numpy as np\n", "<html>\n<head>", "Ingredients:\n- 2 eggs\n", "Q: What is 2 + 2?\nA:",
    "In 1969, ", "  indented", "El perro", "Photosynthesis is the process by which", "\n\n# Title\n", "The following is a list of", "E = mc",
    "A 😀 emoji", "To be, or not to be"]
QUESTIONS = [
    "Hi", "What is the capital of Italy?", "Write a haiku about rain.", "2+2?", "Name three colours.", "Who wrote Hamlet?", "Explain gravity.",
    "Translate 'dog' to French.", "Give me a recipe for pancakes.", "What's the weather?", "Tell me a joke.", "List two prime numbers.",
    "Is water wet?", "Write a Python function that adds two numbers.", "Summarize: The cat sat on the mat.", "Say nothing.",
    "How many days has a week?", "ünïcödé?", "What is a noun?", "Goodbye"]


@pytest.fixture(scope="module")
def smollm():
    transformers = pytest.importorskip("transformers")
    folder = real_folder("smollm2")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return *load_model(folder, "cpu"), theirs, transformers.AutoTokenizer.from_pretrained(folder)


def continued(theirs, tokenizer, prompts, count):
    """New ids of each prompt by transformers' generate, greedy, up to the end token."""
    longest, pad = max(map(len, prompts)), tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = theirs.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)[:, longest:].tolist()
    return [row[:row.index(pad)] if pad in row else row for row in out]           # SmolLM2 pads with its end token


def test_twenty_prompts(smollm):
    model, tokenizer, theirs, their_tokenizer = smollm
    prompts = [their_tokenizer(prompt).input_ids for prompt in PROMPTS]
    assert [tokenizer.prompt(prompt) for prompt in PROMPTS] == prompts
    ours, want = generate(model, prompts, 12, temperature=0), continued(theirs, their_tokenizer, prompts, 12)
    assert [tokenizer.decode(ids) for ids in ours] == [their_tokenizer.decode(ids) for ids in want]


def test_twenty_chats(smollm):
    model, tokenizer, theirs, their_tokenizer = smollm
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [their_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] for chat in chats]
    assert [tokenizer.render(chat, add_generation_prompt=True)[0] for chat in chats] == prompts
    ours = generate(model, prompts, 12, temperature=0, stop_ids=model.config.stop_ids | answer_ends(tokenizer))
    want = continued(theirs, their_tokenizer, prompts, 12)
    assert [tokenizer.decode(ids) for ids in ours] == [their_tokenizer.decode(ids) for ids in want]
    assert min(map(len, ours)) < 12                                # some answers end by themselves


def test_the_chat_of_the_command_line():
    folder = real_folder("smollm2")
    done = run(ROOT / "sample.py", f"--model={folder}", "--chat", "--temperature=0", "--device=cpu", "--max_new_tokens=30",
               input="What is the capital of France?\nAnd of Italy? One word.\n/quit\n")
    assert "Paris" in done.stdout.splitlines()[0] and "Rome" in done.stdout.splitlines()[1]
