"""
Compiles a chat template, a program in Jinja that somebody else wrote, so that it can do nothing but make a text.

Jinja's own sandbox keeps a template from reading attributes that lead to Python's internals and from changing its
arguments. It does not limit time or memory. Here every turn of a loop and every call of a macro is counted, and whatever
can make a long string out of short ones (operators, methods of str, filters) is checked before it runs.
"""
import json
import re
import time
from datetime import datetime
from functools import lru_cache, wraps

LONGEST = 10_000_000   # characters of one string
MOST_STEPS = 300_000   # turns of loops and calls of macros in one rendering
MOST_SECONDS = 10.0
UNLIMITED = ("center", "format", "wordwrap", "urlize", "xmlattr", "pprint", "batch", "slice")   # filters left out


class TooMuch(Exception):
    """The template needs more time or memory than any honest template."""


class Budget:
    """What one rendering has used. Every method raises TooMuch where a limit is passed."""
    def start(self):
        self.steps, self.deadline = 0, time.monotonic() + MOST_SECONDS

    def step(self):
        self.steps += 1
        if self.steps > MOST_STEPS or time.monotonic() > self.deadline:
            raise TooMuch(f"it runs for more than {MOST_STEPS:,} turns of its loops or {MOST_SECONDS:.0f} s")

    def size(self, characters):
        if characters > LONGEST:
            raise TooMuch(f"it makes a text of more than {LONGEST:,} characters")

    def weigh(self, *values, each=0):
        """The length of these values as text, at least, with `each` more for every one. A list may hold itself many
        times over without needing memory, so the walk through it ends at the limit."""
        total, waiting = len(values) * each, list(values)
        while waiting:
            value = waiting.pop()
            total += len(value) if isinstance(value, str) else 1
            self.size(total)
            if isinstance(value, dict):
                waiting += [*value.keys(), *value.values()]
            elif isinstance(value, (list, tuple)):
                waiting += value
        return total

    def concat(self, *parts):
        """a ~ b ~ c of a template."""
        self.weigh(*parts)
        return "".join(map(str, parts))

    def output(self, parts):
        """All that a template, a macro or a block writes."""
        parts = list(parts)
        self.weigh(*parts)
        return "".join(parts)

    def operator(self, operator, left, right):
        long = [len(x) for x in (left, right) if isinstance(x, (str, list, tuple))]
        counts = [x for x in (left, right) if type(x) is int]
        if operator == "%" and isinstance(left, str):
            return self.method("format", left, (right,))
        if operator == "**":
            raise TooMuch("it uses the operator **, which makes numbers of any size")
        self.size(sum(long) if operator == "+" or not counts else sum(long) * max(counts))

    def method(self, name, owner, args):
        """A method of the string `owner`, or a filter on any value, by its name."""
        if name == "join":                                         # "glue".join(items), or items | join("glue")
            items, glue = (args[0], owner) if isinstance(owner, str) and args else (owner, str(args[0]) if args else "")
            self.weigh(*items, each=len(glue))
        self.weigh(owner, *args)
        if name == "replace" and len(args) > 1:
            text = str(owner)
            self.size(len(text) + (text.count(str(args[0])) + 1) * len(str(args[1])))
        elif name in ("center", "ljust", "rjust", "zfill", "expandtabs", "indent"):
            lines = str(owner).count("\n") + str(owner).count("\t") + 1
            self.size(lines * max((x for x in args if type(x) is int), default=8))
        elif name.startswith("format") and re.search(r"\d{6}|:[^}]*\{|%[^a-z]*\*", owner):
            raise TooMuch("it formats a field of 100,000 characters or more")


@lru_cache(maxsize=32)
def compile_template(source, opening, closing):
    """(jinja2.Template, Budget). What the template writes between {% generation %} and {% endgeneration %} is put between
    the strings `opening` and `closing`. ValueError for a mistake in its syntax."""
    import jinja2                                                  # here, because only chats need it
    import jinja2.ext
    import jinja2.sandbox
    from jinja2 import nodes, visitor
    budget = Budget()

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller):
            return opening + caller() + closing

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "**", "%"))
        count, concatenate, concat = map(staticmethod, (budget.step, budget.concat, budget.output))

        def call_binop(self, context, operator, left, right):
            budget.operator(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(self, context, function, *args, **kwargs):
            if isinstance(owner := getattr(function, "__self__", None), str):
                budget.method(function.__name__, owner, (*args, *kwargs.values()))
            return super().call(context, function, *args, **kwargs)

        def wrap_str_format(self, value):                          # how Jinja calls str.format
            format_safely = super().wrap_str_format(value)

            def checked(*args, **kwargs):
                budget.method("format", value.__self__, ())
                return format_safely(*args, **kwargs)
            return checked if format_safely else None

    class Counted(visitor.NodeTransformer):
        """Counts loops and macros, and gives a ~ b a limit."""
        def visit_For(self, node):
            call = nodes.Call(nodes.EnvironmentAttribute("count"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(call))
            return self.generic_visit(node)
        visit_Macro = visit_CallBlock = visit_For

        def visit_Concat(self, node):
            parts = self.generic_visit(node).nodes
            return nodes.Call(nodes.EnvironmentAttribute("concatenate"), parts, [], None, None)

    def limited(name, function):
        @wraps(function)                                           # keeps Jinja's mark: some get the context first
        def checked(*args, **kwargs):
            first = hasattr(function, "jinja_pass_arg")
            value = args[first]
            if name == "join" and not isinstance(value, (str, list, tuple)):
                value = list(value)
            budget.method(name, value, (*args[first + 1:], *kwargs.values()))
            return function(*args[:first], value, *args[first + 1:], **kwargs)
        return checked

    def refuse(message):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, **how):                 # Jinja's own escapes < and > for web pages
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)

    def shown(value):                                              # {{ value }}
        budget.weigh(value)
        return value

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols],
                      finalize=shown)
    filters = {name: function for name, function in sandbox.filters.items() if name not in UNLIMITED}
    sandbox.filters = {name: limited(name, function) for name, function in (filters | dict(tojson=to_json)).items()}
    sandbox.globals = {name: sandbox.globals[name] for name in ("range", "dict", "namespace")} | dict(
        raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
    try:
        tree = Counted().visit(sandbox.parse(source))
        return jinja2.Template.from_code(sandbox, sandbox.compile(tree), sandbox.make_globals(None)), budget
    except (jinja2.TemplateError, RecursionError) as error:
        line = f" in line {error.lineno}" if getattr(error, "lineno", None) else ""
        raise ValueError(f"the chat template is not valid Jinja{line}: {error}") from None


def run_template(source, variables, opening="", closing=""):
    """The text that a template makes of its variables. ValueError: the template refuses them (its own words), fails,
    reads what it may not, or needs too much time or memory."""
    import jinja2
    template, budget = compile_template(source, opening, closing)
    budget.start()
    try:
        return template.render(variables)
    except jinja2.sandbox.SecurityError as error:
        raise ValueError(f"the chat template was stopped: {error}") from None
    except TooMuch as error:
        raise ValueError(f"the chat template was stopped: {error}") from None
    except jinja2.UndefinedError as error:
        raise ValueError(f"the chat template needs something that is not given: {error}") from None
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from None
    except RecursionError:
        raise ValueError("the chat template was stopped: its macros call themselves without end") from None
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"the chat template fails: {type(error).__name__}: {error}") from None
