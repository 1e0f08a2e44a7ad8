"""
Runs chat templates, programs in Jinja that somebody else wrote, in a process of their own that can do nothing but send
back a text.

Jinja's sandbox keeps a template from reading attributes that lead to Python's internals and from changing its
arguments. It limits neither time nor memory, and there are too many ways to use both up, so the limits are those of a
process: it is killed after SECONDS, it may hold MEGABYTES (where the system has such a limit), and it inherits no
environment. The process starts with the first chat, in about 0.1 s, and serves the following ones.
"""
import atexit
import json
import os
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

SECONDS = 10          # for one request, which is one rendering or several short ones
MEGABYTES = 1024      # address space of the process
LONGEST = 10_000_000  # characters of a text
LEVELS = 100          # of lists in lists in the variables


# ---------------------------------------------------------------------------------------------------------------------
# The process that asks

class Worker:
    """The other process. Requests (lists of renderings) and replies (lists of what came of them) are lines of JSON."""
    def __init__(self):
        self.process, self.lock = None, threading.Lock()
        atexit.register(self.stop)

    def start(self):
        packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        names = ("SYSTEMROOT", "LD_LIBRARY_PATH", "PYTHONHOME")
        kept = {name: os.environ[name] for name in names if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).resolve())], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env=kept | {"PYTHONPATH": os.pathsep.join(packages), "PYTHONUTF8": "1"})

    def stop(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None

    def ask(self, request):
        """The reply, or None where the process ended or was killed after SECONDS."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.stop()
                self.start()
            late = threading.Timer(SECONDS, self.process.kill)
            late.start()
            try:
                self.process.stdin.write(request + b"\n")
                self.process.stdin.flush()
                reply = self.process.stdout.readline()
            except OSError:                                        # its end of the pipe is closed
                reply = b""
            finally:
                late.cancel()
            if not reply.endswith(b"\n"):
                self.stop()
                return None
            return json.loads(reply)


WORKER = Worker()


def to_json(value):
    """JSON of messages or variables. ValueError: keys that JSON lacks, or lists in lists without end."""
    try:
        text, level = json.dumps(value, default=lambda other: f"<{type(other).__name__}>"), [value]
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the messages and variables of a chat template must be plain JSON values: {error}") from None
    for _ in range(LEVELS):
        level = [inner for outer in level if isinstance(outer, (dict, list, tuple))
                 for inner in (outer.values() if isinstance(outer, dict) else outer)]
        if not level:
            return text
    raise ValueError(f"the messages and variables of a chat template have at most {LEVELS} levels of lists in lists")


def run_template(source, variables, opening="", closing=""):
    """The text that a template makes of its variables. What it writes between {% generation %} and {% endgeneration %}
    stands between the strings `opening` and `closing`. ValueError: the template is not valid, refuses the variables
    (its own words), fails, reads what it may not, or needs too much time or memory."""
    text = next(run_templates([(source, variables, opening, closing)]))
    if isinstance(text, ValueError):
        raise text
    return text


def run_templates(renderings):
    """Yield what run_template returns, or the ValueError that it raises, for each of (source, variables, opening,
    closing). One request renders them together, equal ones once. All share the limits of a single rendering, so those
    that do not succeed together are repeated one by one."""
    requests = [to_json(list(rendering)) for rendering in renderings]
    distinct = list(dict.fromkeys(requests))
    replies = WORKER.ask(f"[{', '.join(distinct)}]".encode("ascii")) or [None] * len(distinct)
    known = {request: reply for request, reply in zip(distinct, replies)
             if len(distinct) == 1 or reply is not None and "text" in reply}
    for request in requests:
        if request not in known:
            known[request] = (WORKER.ask(f"[{request}]".encode("ascii")) or [None])[0]
        reply = known[request] or {"error": f"the chat template was stopped: it needs more than {SECONDS} s or "
                                            f"{MEGABYTES} MB"}
        yield ValueError(reply["error"]) if "error" in reply else reply["text"]


# ---------------------------------------------------------------------------------------------------------------------
# The process that renders

@lru_cache(maxsize=32)
def compile_template(source, opening, closing):
    from datetime import datetime

    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller):
            return opening + caller() + closing

    def refuse(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):   # Jinja's escapes < and >
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                               extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= dict(raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
    return environment.from_string(source)


def rendered(source, variables, opening, closing):
    """{"text": ...} or {"error": one line}."""
    import jinja2
    try:
        text = compile_template(source, opening, closing).render(variables)
        if len(text) <= LONGEST:
            return {"text": text}
        return {"error": f"the chat template was stopped: it makes a text of more than {LONGEST:,} characters"}
    except jinja2.TemplateSyntaxError as error:
        what = f"is not valid Jinja in line {error.lineno}: {error.message}"
    except jinja2.sandbox.SecurityError as error:
        what = f"was stopped: {error}"
    except jinja2.UndefinedError as error:
        what = f"needs something that is not given: {error}"
    except jinja2.TemplateError as error:
        what = f"refuses these messages: {error}"
    except MemoryError:
        what = f"was stopped: it needs more than {MEGABYTES} MB"
    except RecursionError:
        what = "was stopped: its macros call themselves without end"
    except Exception as error:                                     # whatever a program can do wrong
        what = f"fails: {type(error).__name__}: {error}"
    return {"error": " ".join(f"the chat template {what}".split())[:500]}


def serve_requests():
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (MEGABYTES << 20, MEGABYTES << 20))
    except (ImportError, ValueError, OSError):                     # Windows, and systems that refuse
        pass
    for line in sys.stdin.buffer:
        # ends an orphan: the process that asked may have been killed while a template never ends
        alarm = threading.Timer(SECONDS + 5, os._exit, [1])
        alarm.daemon = True
        alarm.start()
        replies, room = [], LONGEST
        for rendering in json.loads(line):
            replies.append(rendered(*rendering))
            room -= len(replies[-1].get("text", ""))
            if room < 0:                                           # too much together: the asker repeats the others
                replies[-1] = None
                break
        alarm.cancel()
        sys.stdout.buffer.write(json.dumps(replies).encode("ascii") + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve_requests()
