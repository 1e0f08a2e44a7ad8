"""Runs scripts of the project in processes forked from this one, which has imported torch and every stage already.

A new interpreter spends two seconds of a processor on these imports, in every one of the tests' hundred commands. A forked
process has its own command line, folder, environment, files and exit status, and ends as an interpreter ends.
Requests are lines of JSON on standard input. The answers are two lines each: the process id at once, then the exit status.
"""
import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import threading

STAGES = ("bpe", "model", "prepare", "sample", "train", "evaluate", "quantize", "finetune_lora", "rlhf", "serve")
LATER = ("matplotlib.backends.backend_agg", "matplotlib.pyplot", "typeguard", "torch.distributed.checkpoint", "torch.distributed.fsdp",
         "torch._dynamo", "torch.fx.experimental.symbolic_shapes")  # what the stages import when they need it


def serve():
    """Fork for every request. Returns in the child: the request. The server itself ends with its standard input."""
    requests, answers = os.fdopen(os.dup(0), "rb", buffering=0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)                     # what a module prints while it is imported is no answer
    for name in STAGES + LATER:
        importlib.import_module(name)
    gc.freeze()                                                    # the collector would copy the pages of all these objects
    for line in requests:
        child = os.fork()
        if not child:
            os.setpgid(0, 0)                                       # with its ranks, which a time-out ends together
            requests.close()
            os.close(answers)
            return json.loads(line)
        os.write(answers, f"{child}\n".encode())
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(answers, f"{status}\n".encode())
    sys.exit()


def start(arguments, folder):
    sys.argv = arguments
    if arguments[0] == "-m":
        sys.path[0] = folder
        del arguments[0]
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(arguments[0])
        runpy.run_path(arguments[0], run_name="__main__")


def split(ranks):
    """Fork into processes that torch.distributed connects, as torchrun starts them. Returns the process ids of the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    others = []
    for rank in range(ranks):
        child = os.fork() if rank else 0
        if not child:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            if rank:
                return []
        else:
            others.append(child)
    return others


def ended(*words):
    """start(*words). Returns the exit status, and says what an interpreter says at its end."""
    try:
        start(*words)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


request = serve()
for number, (path, flags) in enumerate(zip(request["files"], (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY))):
    os.dup2(os.open(path, flags), number)
os.environ.clear()
os.environ.update(request["environment"])
os.chdir(request["folder"])
others = split(request["ranks"]) if request["ranks"] > 1 else []
status = ended(request["arguments"], request["folder"])
threading._shutdown()                                              # an interpreter's end, but for freeing a gigabyte of objects
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
for other in others:
    if status:
        os.kill(other, signal.SIGKILL)                             # it may wait for this one
    status = status or os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])
os._exit(status)
