"""
Runs a program that a model wrote, in a fresh Python with limits, and says whether it ran to its end.

What it limits: seconds, processor time, memory, the size of a file, open files; the environment is empty, the folder a
temporary one. On Linux, where user namespaces are allowed, the program has no network and no process outlives it.
What it does not protect against: the program may read every file that you may read, and write where you may write. It
runs as you. Without namespaces it also has the network. On Windows and macOS only some of the limits exist. Run code of
a model that you do not trust in a virtual machine.

Success is a random word in a file, written after the program's last line. An exit code proves nothing: `sys.exit(0)`
and `os._exit(0)` in the middle of a wrong answer also give 0. A program that searches its interpreter's frames can
find the word, and an object whose __eq__ always answers True passes every assert: a score counts only honest programs.
"""
import functools
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

# Runs in the new interpreter. Limits are set here: a preexec_fn can deadlock in a parent that has threads.
HARNESS = """
import io, runpy, sys
word, sys.stdin = sys.stdin.readline(), io.StringIO()
seconds, megabytes = int(sys.argv[1]), int(sys.argv[2])
try:
    import resource
    for name, limit in (("CPU", seconds), ("AS", megabytes << 20), ("DATA", megabytes << 20), ("FSIZE", 1 << 20),
                        ("NOFILE", 64), ("CORE", 0), ("NPROC", 64)):
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
        except (AttributeError, ValueError, OSError):
            pass
except ImportError:
    pass
sys.argv = ["program.py"]
def main():
    runpy.run_path("program.py", run_name="__main__")
    with open("verdict", "w") as file:
        file.write(word)
main()
"""


@dataclass
class Outcome:
    passed: bool
    reason: str      # "ran to its end", or why it did not
    output: str      # the first characters of what it printed


@functools.cache
def isolation():
    """The command that gives a program namespaces of its own for network and processes; [] where there is none."""
    command = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if not shutil.which("unshare"):
        return []
    for words in (command, command[:-1]):
        if subprocess.run([*words, "true"], capture_output=True).returncode == 0:
            return words
    return []


def kill(process):
    """End the process and its group."""
    if os.name == "posix":
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    else:
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
    process.kill()
    process.wait()


def run_program(code, seconds=10.0, megabytes=512):
    """Run Python source in an interpreter of its own, for at most `seconds` of wall time. Returns an Outcome; never
    raises because of the program."""
    word = secrets.token_hex(16) + "\n"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "program.py").write_text(code, encoding="utf-8", errors="replace")
        with open(folder / "output", "w+b") as output:             # read by this handle: its name may be replaced
            process = subprocess.Popen(
                [*isolation(), sys.executable, "-I", "-S", "-B", "-c", HARNESS, str(int(seconds) + 1), str(megabytes)],
                stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True,
                env={name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ})
            deadline, late = time.monotonic() + seconds, False
            try:
                process.stdin.write(word.encode())
                process.stdin.close()
            except OSError:                                        # it ended already
                pass
            while True:
                ended, late = process.poll() is not None, time.monotonic() > deadline
                passed = written(folder / "verdict", word)
                if passed or ended or late:
                    break
                time.sleep(0.005)
            kill(process)
            passed = passed or written(folder / "verdict", word)
            size = output.seek(0, os.SEEK_END) + 1
            output.seek(0)
            text = output.read(1 << 16).decode("utf-8", errors="replace").replace(name, "")
    if passed:
        return Outcome(True, "ran to its end", text)
    lines = text.strip().splitlines()
    if late and not ended:
        return Outcome(False, f"ran longer than {seconds:g} s", text)
    if size > 1 << 20:
        return Outcome(False, "printed more than 1 MB", text)
    if process.returncode > 0 and lines and "Error" in lines[-1]:
        return Outcome(False, lines[-1][:200], text)
    return Outcome(False, f"ended before its last line (exit code {process.returncode})", text)


def written(path, word):
    """Is this a plain file that holds the word? The program may have put a pipe or a link in its place."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
        with open(handle, "rb") as file:
            return stat.S_ISREG(os.fstat(handle).st_mode) and file.read(len(word) + 2).split() == word.encode().split()
    except OSError:
        return False
