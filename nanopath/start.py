"""
Imported before torch by every stage that computes: what has to be settled while torch loads.

Threads   OpenMP's threads wait for the next product in a busy loop, so two trainings on one machine slow each other
          down; GOMP_SPINCOUNT lets them sleep sooner. A container's CPU quota counts, not the cores of its host.
Ctrl-C    loading torch takes a second; an interrupt during it ends the program without a traceback.
"""
import math
import os
import signal
import sys
from pathlib import Path


def cgroup_values(controller, file, root=Path("/")):
    """What the control groups of this process say in `file` (v2 file name: v1 file name), from its own group
    upwards."""
    v2, v1 = file
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            try:
                found.append((folder / (v1 if controllers else v2)).read_text(encoding="utf-8").split())
            except OSError:                                      # a container may see its own group as the mount itself
                pass
            if folder == mount:
                break
    return found


def memory_limit(root=Path("/")):
    """Bytes that the control groups allow this process; infinity where they do not limit it."""
    values = cgroup_values("memory", ("memory.max", "memory.limit_in_bytes"), root)
    return min((float(value[0]) for value in values if value and value[0].isdigit()), default=math.inf)


def cores(root=Path("/")):
    """Processor cores that this process may use: its affinity, and the CPU quota of its control groups."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [value if len(value) == 2 else None for value in cgroup_values("cpu", ("cpu.max", ""), root)]
    for quota, period in zip(cgroup_values("cpu", ("", "cpu.cfs_quota_us"), root),
                             cgroup_values("cpu", ("", "cpu.cfs_period_us"), root)):
        quotas.append((quota[0], period[0]))
    for quota in quotas:
        if quota and quota[0].isdigit():                           # "max" and -1: no quota
            count = min(count, max(1, math.ceil(int(quota[0]) / int(quota[1]))))
    return count


def settle():
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    if cores() < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(cores()))
    main = getattr(sys.modules["__main__"], "__file__", None)      # only for our own scripts; flags.parse undoes it
    if main and Path(main).resolve().parent == Path(__file__).resolve().parents[1] and hasattr(signal, "SIGINT"):
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


settle()
