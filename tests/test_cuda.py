"""On a machine with a CUDA GPU: the same numbers as on the CPU. Elsewhere these tests are skipped."""
import copy
import random
import shutil

import pytest
import torch

import sample
import serve
from bpe import Tokenizer
from conftest import ROOT, SMALL, losses, run
from model import KNOWN_MODELS, load_model, save_model
from nanopath import kernels
from quantize import QuantLinear, quantize_model
from test_model import make, shrunk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
TOKENIZER = Tokenizer.train([], 264)


@pytest.fixture(autouse=True)
def exact():
    """float32 products are float32 products: no TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def ids_of(rows, T, V=256):
    return torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", sorted(KNOWN_MODELS))
@torch.no_grad()
def test_logits_of_every_kind_of_model(name):
    cpu = make(seed=1, **shrunk(name)).eval()
    gpu, ids = copy.deepcopy(cpu).cuda(), ids_of(3, 40)
    wanted = cpu(ids)
    assert (gpu(ids.cuda()).cpu() - wanted).abs().max() < 1e-4
    gpu.dtype = torch.bfloat16
    assert (gpu(ids.cuda()).float().cpu() - wanted).abs().mean() < 0.05 * wanted.abs().mean()


def test_gradients():
    cpu = make(seed=1)
    gpu, ids = copy.deepcopy(cpu).cuda(), ids_of(4, 33)
    for model, x in ((cpu, ids), (gpu, ids.cuda())):
        model(x[:, :-1].contiguous(), x[:, 1:].contiguous()).backward()
    for (name, p), other in zip(cpu.named_parameters(), gpu.parameters()):
        assert (p.grad - other.grad.cpu()).abs().max() < 1e-4 * max(1e-3, p.grad.abs().max()), name


def test_greedy_text():
    cpu = make(seed=2, block_size=96).eval()
    gpu = copy.deepcopy(cpu).cuda()
    prompts = [ids_of(1, n)[0].tolist() for n in (3, 17, 40)]
    wanted = sample.generate(cpu, prompts, 30, temperature=0, stop_ids=())
    assert sample.generate(gpu, prompts, 30, temperature=0, stop_ids=()) == wanted
    for text, prompt in zip(wanted, prompts):
        assert sample.generate_naive(gpu, prompt, 30, 0) == text


@pytest.mark.parametrize("name", sorted(KNOWN_MODELS))
def test_recorded_steps_write_the_same_text(name):
    """Rows of different lengths that end at different times, in a context that overflows; keys in 8 bits too."""
    cpu = make(seed=2, **shrunk(name) | dict(block_size=48)).eval()
    gpu = copy.deepcopy(cpu).cuda()
    prompts = [ids_of(1, n)[0].tolist() for n in (3, 17, 30)]
    how = dict(temperature=0, stop_ids=range(0, 256, 64))
    assert sample.generate(gpu, prompts, 60, **how) == sample.generate(cpu, prompts, 60, **how)
    gpu.kv_int8 = True
    assert all(len(text) == 12 for text in sample.generate(gpu, prompts, 12, temperature=0, stop_ids=()))


def test_the_compiled_loss():
    z, gold = torch.randn(64, 500, device="cuda"), torch.randint(500, (64, 1), device="cuda")
    counted = torch.rand(64, 1, device="cuda") < 0.7
    found = torch.compile(kernels.loss_and_gradient, dynamic=False)(z, gold, counted, 3.0)
    for a, b in zip(found, kernels.loss_and_gradient(z.cpu(), gold.cpu(), counted.cpu(), 3.0)):
        assert (a.cpu() - b).abs().max() < 1e-3


def test_seeds_give_the_same_text_on_both():
    """Sampling draws its random numbers on the CPU, so a seed means the same text, rounding aside."""
    cpu = make(seed=2, block_size=96).eval()
    how = dict(temperature=1.0, seed=[1, 2, 3], stop_ids=())
    prompts = [ids_of(1, 9)[0].tolist()] * 3
    assert sample.generate(copy.deepcopy(cpu).cuda(), prompts, 20, **how) == sample.generate(cpu, prompts, 20, **how)


@pytest.mark.parametrize("group", [32, 64, 128])
@torch.no_grad()
def test_the_int4_kernel_is_its_dequantized_weight(group):
    model = make(seed=3, n_embd=256, n_hidden=512, n_head=4, head_dim=64, n_kv_head=4)
    quantize_model(model, "rtn", group_size=group, search=False)
    seen = 0
    for name, linear in model.cuda().layers.named_modules():
        if isinstance(linear, QuantLinear):
            weight = linear.dequantize(torch.float32)
            x = torch.randn(7, linear.in_features, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).bfloat16()
            wanted = x.float() @ weight.T + (0 if linear.bias is None else linear.bias.float())
            product = kernels.pack_quantized(linear, torch.bfloat16)
            assert isinstance(product, kernels.Int4LinearCUDA), (name, type(product))
            found = product(x).float()
            assert (found - wanted).abs().max() < 0.02 * wanted.abs().max(), name
            seen += 1
    assert seen >= 7


@pytest.mark.parametrize("method", ["int8", "w8a8", "nf4", "rtn"])
@torch.no_grad()
def test_a_quantized_folder(method, tmp_path):
    model = quantize_model(make(seed=3, n_embd=256, n_hidden=512, n_head=4, head_dim=64, n_kv_head=4), method)
    save_model(tmp_path, model, TOKENIZER)
    ids = ids_of(2, 30)
    wanted = load_model(tmp_path, "cpu", torch.float32)[0](ids)
    gpu = load_model(tmp_path, "cuda", torch.bfloat16)[0].pack()
    assert (gpu(ids.cuda()).float().cpu() - wanted).abs().mean() < 0.06 * wanted.abs().mean()


def test_the_server_writes_what_sample_writes():
    model, rng = make(seed=1, block_size=96).eval().cuda().pack(), random.Random(0)
    engine = serve.Engine(model, TOKENIZER, 8, 0, chunk=16)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(1, 60))] for _ in range(12)]
    requests = [engine.submit(prompt, 20, dict(temperature=0, stop_ids=())) for prompt in prompts]
    while engine.step():
        pass
    for request, prompt in zip(requests, prompts):
        assert request.new == sample.generate(model, [prompt], 20, temperature=0, stop_ids=())[0]


@pytest.fixture
def flags(tiny):
    small = [flag for flag in SMALL if "device" not in flag and "dtype" not in flag]
    return ["train.py", f"--dataset={tiny}", *small, "--log_every=1", "--eval_every=0", "--dtype=float32"]


def test_training_equals_the_cpu_and_resumes(flags, tmp_path):
    for out, more in (("cpu", ["--device=cpu", "--max_steps=12"]), ("gpu", ["--device=cuda", "--max_steps=12"]),
                      ("cut", ["--device=cuda", "--max_steps=12", "--save_every=6"])):
        run(ROOT / flags[0], *flags[1:], *more, "--compile=off", f"--out={tmp_path / out}", cwd=tmp_path, fresh=True)
    for a, b in zip(losses(tmp_path / "cpu"), losses(tmp_path / "gpu")):
        assert abs(a - b) < 2e-3 * a
    for step in (tmp_path / "cut/state").glob("step-*12"):
        shutil.rmtree(step)
    run(ROOT / "train.py", "--resume", f"--out={tmp_path / 'cut'}", cwd=tmp_path, fresh=True)
    resumed = losses(tmp_path / "cut")[-6:]
    assert all(abs(a - b) < 1e-4 for a, b in zip(resumed, losses(tmp_path / "gpu")[-6:]))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_nccl(parallel, flags, tmp_path):
    run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", ROOT / flags[0], *flags[1:], "--device=cuda", "--compile=off",
        "--max_steps=5", f"--parallel={parallel}", f"--out={tmp_path / 'one'}", cwd=tmp_path, fresh=True)
    run(ROOT / flags[0], *flags[1:], "--device=cuda", "--compile=off", "--max_steps=5", f"--out={tmp_path / 'two'}", cwd=tmp_path, fresh=True)
    assert all(abs(a - b) < 1e-3 for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two")))


def test_compiled_in_bf16(flags, tmp_path):
    run(ROOT / flags[0], *flags[1:], "--device=cuda", "--compile=on", "--dtype=bfloat16", "--max_steps=30", f"--out={tmp_path / 'a'}",
        cwd=tmp_path, fresh=True)
    run(ROOT / flags[0], *flags[1:], "--device=cpu", "--compile=off", "--max_steps=30", f"--out={tmp_path / 'b'}", cwd=tmp_path, fresh=True)
    assert abs(losses(tmp_path / "a")[-1] - losses(tmp_path / "b")[-1]) < 0.1
