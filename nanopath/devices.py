"""
The machine a run stands on: its processes and device, which number format multiplies fastest, how much memory there is.

Nothing here is taken from a table of product names: speed is measured, memory is asked for.
"""
import gc
import math
import os
import sys
import time

import torch
import torch.distributed as dist


def setup(name, device):
    """Process group (under torchrun), and the device of this process. Returns (device, rank, world).

    name is the flag --device, device what it means on this machine.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device.type == "mps" and world > 1:                         # one such GPU, and no way for processes to talk on it
        if name != "auto":
            raise SystemExit(f"--device={name}: only one process can use it. Without torchrun, or --device=cpu")
        device = torch.device("cpu")
    kind = device.type
    if kind == "cuda":
        device = torch.device("cuda", local if world > 1 else device.index or 0)
        if device.index >= torch.cuda.device_count():
            raise SystemExit(f"--device={name}: process {rank} wants {device}, there are "
                             f"{torch.cuda.device_count()} GPUs. Lower --nproc_per_node")
    if kind == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        nccl = kind == "cuda" and dist.is_nccl_available()         # not on Windows
        store, _, _ = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":         # after a restart it still holds addresses of the dead;
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)     # machines: runs/nodes.sh
        dist.init_process_group("nccl" if nccl else "gloo", store=store, rank=rank, world_size=world,
                                **({"device_id": device} if nccl else {}))
    if kind == "cpu":
        torch.set_flush_denormal(True)
    return device, rank, world


def pick_dtype(name, device, world):
    """dtype of the matmuls for the flag --dtype."""
    kind = device.type
    if name not in ("auto", "float32", "bfloat16", "float16", "float64"):
        raise SystemExit(f"--dtype={name}: choose auto, float32, bfloat16, float16 or float64")
    if name == "float64" and kind == "mps":
        raise SystemExit("--dtype=float64: this GPU has none. Use --dtype=float32, or --device=cpu")
    if name != "auto":
        return getattr(torch, name)
    bf16 = kind != "mps" and matmul_speed(device, torch.bfloat16) > 1.2 * matmul_speed(device, torch.float32)
    if world > 1:                                                  # one answer for all
        flag = torch.tensor(int(bf16), device=device)
        dist.broadcast(flag, 0)
        bf16 = bool(flag.item())
    return torch.bfloat16 if bf16 else torch.float32


def matmul_speed(device, dtype, size=None):
    """Measured FLOP/s of a square matmul: what this very machine can do. The best of six, about 10 ms on a CPU.

    A name test would be wrong here: of two processors that both advertise bf16 instructions one multiplies 3 times
    faster in bf16 than in fp32, the other 2 times slower (measured).
    """
    size = size or (512 if device.type == "cpu" else 4096)
    a = torch.randn(size, size, device=device).to(dtype)
    best = math.inf
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size ** 3 / best


def memory_used(device):
    """Most bytes this process ever held: on a GPU those of its tensors, else all of it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:                                            # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_size(device):
    """Bytes of this GPU, or of this machine; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):                  # Windows has none of it
        return 0


def compiler_problem(device):
    """Why torch.compile does not work in this process, in a line; empty where it does."""
    try:
        torch.compile(lambda x: x * 2 + 1, dynamic=False)(torch.ones(8, device=device))
        return ""
    except Exception as error:                                     # of many kinds, and new ones with every version
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:200] if str(error) else type(error).__name__


def out_of_memory(error):
    """CUDA has an exception of its own for it; MPS and the CPU only have words."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED"))


def free_memory(device):
    """After an exception gave up, and out of its handler, which keeps tensors alive."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def pick_device(name="auto"):
    """torch.device for a --device flag: auto is CUDA, then MPS, then CPU. Raises ValueError for what is not here."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available.get(str(name).split(":")[0], False):
        raise ValueError(f"--device={name}: not available here. Use auto, or one of: "
                         + ", ".join(kind for kind, there in available.items() if there))
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device={name}: no such device. Use auto, cpu, cuda, cuda:0, mps") from None
