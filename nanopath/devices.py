"""
The machine under a run: this process and the others, its device, its number format, its memory and speed.

Nothing here comes from a table of product names: speed is measured, memory and cores are asked for.
"""
import gc
import math
import os
import sys
import time

import torch
import torch.distributed as dist

from nanopath.start import memory_limit


class Machine:
    """Device and ranks of this process, and the few things on which all processes must agree.

    device                 torch.device of this process
    rank, world            of all processes; rank 0 prints, logs and saves
    data_rank, data_world  of data-parallel processes: tensor-parallel processes read the same sequences
    dtype, peak            number format of the matmuls; FLOP/s of all processes together (see `measure`)
    mesh                   the processes as (replicas, shards, tensor), see parallel.py; None for a single process
    """
    def __init__(self, device="auto", tensor_parallel=1):
        try:
            self.device, self.rank, self.world = setup(device, pick_device(device))
        except ValueError as error:
            raise SystemExit(str(error)) from None
        self.data_rank, self.data_world = self.rank // tensor_parallel, max(1, self.world // tensor_parallel)
        self.dtype, self.peak, self.mesh = torch.float32, math.nan, None

    def measure(self, dtype="auto"):
        """Decide the number format for the flag --dtype (the same on all processes) and measure the speed of a
        matmul."""
        self.dtype = pick_dtype(dtype, self)
        self.peak = self.world * matmul_speed(self.device, self.dtype)

    def sum(self, values):
        """The sums over all processes of a list of numbers, in float64. Every process must call it equally often."""
        place = self.device if self.device.type == "cuda" else "cpu"
        total = torch.tensor([float(value) for value in values], dtype=torch.float64, device=place)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def any(self, flag):
        """Is it true on any process?"""
        return bool(self.sum([bool(flag)])[0])

    def least(self, number):
        """The smallest of the numbers of all processes."""
        return min(self.sum([number * (self.rank == i) for i in range(self.world)]))

    def wait(self):
        """Until every process has come here."""
        self.sum([0])

    def say(self, *words):
        """Print on rank 0 only. A terminal that was closed, or a pipe that nobody reads, does not end a run."""
        if self.rank == 0:
            try:
                print(*words, flush=True)
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def clock(self):
        """Seconds, after the device has done everything it was asked to."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
        return time.perf_counter()

    def close(self):
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


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


def setup(name, device):
    """Join the process group (under torchrun) and choose the device of this process. Returns (device, rank, world).

    name is the flag --device, device what it means on this machine.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device.type == "mps" and world > 1:                         # one such GPU, and no collectives on it
        if name != "auto":
            raise SystemExit(f"--device={name}: one process can use it. Start without torchrun, or with --device=cpu")
        device = torch.device("cpu")
    kind = device.type
    if kind == "cuda":
        device = torch.device("cuda", local if world > 1 else device.index or 0)
        if device.index >= torch.cuda.device_count():
            raise SystemExit(f"--device={name}: process {rank} needs {device}, but there are "
                             f"{torch.cuda.device_count()} GPUs. Use a smaller --nproc_per_node")
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        nccl = kind == "cuda" and dist.is_nccl_available()         # not on Windows
        store, _, _ = next(dist.rendezvous("env://"))
        # after a restart the store still holds addresses of dead processes; for several machines see runs/nodes.sh
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if nccl else "gloo", store=store, rank=rank, world_size=world,
                                **({"device_id": device} if nccl else {}))
    if kind == "cpu":
        torch.set_flush_denormal(True)
    return device, rank, world


def pick_dtype(name, machine):
    """dtype of the matmuls for the flag --dtype."""
    if name == "float64" and machine.device.type == "mps":
        raise SystemExit("--dtype=float64: this GPU has none. Use --dtype=float32, or --device=cpu")
    if name != "auto":
        return getattr(torch, name)
    bf16 = machine.sum([machine.rank == 0 and bf16_is_faster(machine.device)])[0]      # rank 0 decides for all
    return torch.bfloat16 if bf16 else torch.float32


def bf16_is_faster(device):
    """The same answer every time on the same machine, also under load: on a CPU by processor time of this thread.

    The processor's flags do not say: of two processors with bf16 instructions one multiplies three times faster in bf16
    than in fp32, the other two times slower (measured).
    """
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    clock = time.perf_counter if os.name == "nt" else time.thread_time                # Windows counts in steps of 15 ms
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for _ in range(6):
        for dtype in best:
            a = torch.ones(512, 512, dtype=dtype)
            start = clock()
            a @ a
            best[dtype] = min(best[dtype], clock() - start)
    return best[torch.bfloat16] * 1.2 < best[torch.float32]


def matmul_speed(device, dtype, size=None):
    """Measured FLOP/s of a square matmul, the best of six (about 10 ms on a CPU). For the line on the screen only:
    under load it is too low."""
    size = size or (512 if device.type == "cpu" else 4096)
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size ** 3 / best


def memory_used(device):
    """Largest number of bytes this process ever held: on a GPU those of its tensors, else all of its memory."""
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
    """Bytes of this GPU, or of this machine or container; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    try:
        return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), memory_limit())
    except (AttributeError, ValueError, OSError):                  # Windows
        return 0


def compiler_problem(device):
    """Why torch.compile does not work in this process, in one line; empty where it does."""
    try:
        torch.compile(lambda x: x * 2 + 1, dynamic=False)(torch.ones(8, device=device))
        return ""
    except Exception as error:                                     # of many kinds, and new ones with every version
        return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]


def out_of_memory(error):
    """Does this exception mean full memory? CUDA has a class of its own for it, MPS and the CPU only words."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def free_memory(device):
    """Return cached memory to the system. Call it outside the exception's handler, which keeps tensors alive."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
