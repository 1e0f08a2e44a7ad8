"""sample.py: the distribution is exact, rows are independent, the command line refuses what cannot work."""
import pytest
import torch

import sample
from bpe import Tokenizer
from conftest import ROOT, run
from model import save_model
from test_model import make


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, make(eos_token_id=256), Tokenizer.train([], 264))
    return folder


@pytest.mark.parametrize("temperature,top_k,top_p", [(1.0, 0, 0), (0.7, 5, 0), (1.3, 0, 0.8), (1.0, 6, 0.7)])
def test_choose_follows_the_distribution_of_transformers(temperature, top_k, top_p):
    """The share of each id over a fine grid of cuts is its probability, after transformers' own warpers."""
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(1)) * 2
    warped = warpers.TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1 else logits
    if top_k:
        warped = warpers.TopKLogitsWarper(top_k)(None, warped)
    if top_p:
        warped = warpers.TopPLogitsWarper(top_p)(None, warped)
    n = 20000
    cuts = (torch.arange(n) + 0.5) / n
    ids = sample.choose(logits.expand(n, -1), cuts, temperature, top_k, top_p)
    share = torch.bincount(ids, minlength=20) / n
    assert (share - warped.softmax(-1)[0]).abs().max() < 2 / n


def test_greedy_is_argmax_without_cache():
    model, prompt = make(), [5, 6, 7]
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(20):
            ids.append(model(torch.tensor([ids])).argmax(-1)[0, -1].item())
    assert sample.generate(model, [prompt], 20, temperature=0, stop_ids=()) == [ids[3:]]


def test_a_row_does_not_depend_on_its_neighbours():
    model = make()
    first = sample.generate(model, [[1, 2, 3]], 30, temperature=0.9, top_k=40, seed=3)[0]
    batch = sample.generate(model, [[1, 2, 3], [9] * 11, [4]], 30, temperature=0.9, top_k=40, seed=3)
    assert batch[0] == first and len({tuple(row) for row in batch}) == 3
    assert sample.generate(model, [[1, 2, 3]], 30, temperature=0.9, top_k=40, seed=4)[0] != first


def test_it_writes_beyond_the_context_and_stops_at_the_end_token():
    model = make(block_size=16)
    long = sample.generate(model, [[1, 2, 3], [4] * 16], 50, temperature=0, stop_ids=())
    assert [len(row) for row in long] == [50, 50]
    for row, prompt in enumerate(([1, 2, 3], [4] * 16)):            # each forgets when it is full, not its neighbour
        assert long[row] == sample.generate(model, [prompt], 50, temperature=0, stop_ids=())[0]
    with torch.no_grad():                                          # a prompt that just fits is read to its first token
        assert long[1][0] == model(torch.tensor([[4] * 16])).argmax(-1)[0, -1].item()
    stop = long[0][5]
    cut = sample.generate(model, [[1, 2, 3]], 50, temperature=0, stop_ids={stop})[0]
    assert cut == long[0][:long[0].index(stop)]


def test_logprobs_are_the_models():
    model, prompt = make(), [1, 2, 3]
    out = list(sample.stream(model, [prompt], 8, temperature=0.5, stop_ids=()))
    ids = prompt + [token for _, token, _ in out]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).log_softmax(-1)[0]
    for t, (_, token, logprob) in enumerate(out):
        assert abs(logprobs[2 + t, token].item() - logprob) < 1e-4


def test_command_line(folder, tmp_path):
    same = [run(ROOT / "sample.py", f"--model={folder}", "--prompt=ab", "--max_new_tokens=20", "--device=cpu").stdout
            for _ in range(2)]
    assert same[0] == same[1] and same[0].startswith("ab")
    (tmp_path / "p.txt").write_text("ab", encoding="utf-8")
    assert run(ROOT / "sample.py", f"--model={folder}", f"--prompt_file={tmp_path / 'p.txt'}", "--max_new_tokens=20",
               "--device=cpu").stdout == same[0]
    assert run(ROOT / "sample.py", f"--model={folder}", "--prompt_file=-", "--max_new_tokens=20", "--device=cpu",
               input="ab").stdout == same[0]
    several = run(ROOT / "sample.py", f"--model={folder}", "--num_samples=3", "--max_new_tokens=5", "--device=cpu").stdout
    assert "--- sample 3" in several


@pytest.mark.parametrize("flags,message", [
    (["--chat"], "--chat"), (["--temperature=-1"], "--temperature=-1"), (["--temperature=nan"], "--temperature=nan"),
    (["--top_k=-3"], "--top_k=-3"), (["--top_p=1.5"], "--top_p=1.5"), (["--max_new_tokens=0"], "--max_new_tokens=0"),
    (["--num_samples=0"], "--num_samples=0"), (["--prompt=" + "x" * 65], "--prompt is 65 tokens"),
    (["--prompt_file=nowhere.txt"], "--prompt_file=nowhere.txt"), (["--model=nowhere"], "no config.json"),
    (["--dtype=int3"], "--dtype=int3"), (["--bogus=1"], "--bogus"), (["--device=tpu"], "--device=tpu")])
def test_bad_input_is_one_clear_line(folder, flags, message):
    done = run(ROOT / "sample.py", f"--model={folder}", "--device=cpu", *flags, check=False)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def test_stdin_that_is_not_utf8(folder):
    import subprocess
    import sys
    done = subprocess.run([sys.executable, ROOT / "sample.py", f"--model={folder}", "--prompt_file=-"],
                          input=b"\xff\xfe", capture_output=True, cwd=ROOT)
    assert done.returncode != 0 and b"not UTF-8" in done.stderr and b"Traceback" not in done.stderr
