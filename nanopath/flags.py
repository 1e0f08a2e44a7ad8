"""
The command line of every stage: a dataclass Config whose fields are the flags, with the bounds beside each field.

    top_p: Annotated[float, Bound(0, 1)] = 0.0   # choose among the likeliest tokens that hold this probability; 0: all

tyro turns Config into flags and its comments into --help; `check_bounds` refuses impossible values, wherever they come
from: the command line, a preset, a saved run, or another program.
"""
import dataclasses
import functools
import math
import os
import shlex
import signal
import sys
import typing
from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """Allowed numbers: low <= value <= high, or low < value with above=True. off: one more number that is allowed (0:
    off)."""
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    off: float | None = None

    def allows(self, value):
        return value == self.off or (value > self.low if self.above else value >= self.low) and value <= self.high

    def __str__(self):
        least = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        most = f"at most {self.high:g}"
        words = " and ".join([least] * (self.low > -math.inf) + [most] * (self.high < math.inf))
        if self.low > -math.inf and self.high < math.inf and not self.above:
            words = f"between {self.low:g} and {self.high:g}"
        return words if self.off is None else f"{self.off:g}, or {words}"


Positive = typing.Annotated[int, Bound(1)]
Count = typing.Annotated[int, Bound(0)]                            # 0 means off, or as the comment says
Rate = typing.Annotated[float, Bound(0, 1e30)]                     # 100 million times that still fits into float32
Share = typing.Annotated[float, Bound(0, 1)]


@functools.cache
def hints_of(kind):
    return typing.get_type_hints(kind, include_extras=True)


def check_bounds(cfg):
    """Raise ValueError naming the first field whose value has the wrong type, is not finite, or is out of its Bound.
    Fields of other types than int, float, bool, Literal and their unions with None are left alone."""
    for field in dataclasses.fields(cfg):
        value, hint, bound = getattr(cfg, field.name), hints_of(type(cfg))[field.name], None
        if typing.get_origin(hint) is typing.Annotated:
            hint, *notes = typing.get_args(hint)
            bound = next((note for note in notes if isinstance(note, Bound)), None)
        if type(None) in typing.get_args(hint):                    # int | None: None is allowed, else it is an int
            if value is None:
                continue
            kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
            hint = kinds[0] if len(kinds) == 1 else hint
        if hint is bool and type(value) is not bool:
            raise ValueError(f"--{field.name}={value!r}: must be true or false")
        if typing.get_origin(hint) is typing.Literal and value not in typing.get_args(hint):
            raise ValueError(f"--{field.name}={value}: choose one of {', '.join(map(str, typing.get_args(hint)))}")
        if hint in (int, float):
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or hint is int and value != int(value):
                raise ValueError(f"--{field.name}={value}: must be a {'whole' if hint is int else 'finite'} number")
            if bound and not bound.allows(value):
                raise ValueError(f"--{field.name}={value}: must be {bound}")


def nobody_reads():
    """For a BrokenPipeError: the reader of our lines, such as head, has closed the pipe. Ends the program quietly."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(1) from None


def parse(Config, doc, default=None, args=None):
    """The command line -> Config. doc: the stage's docstring, whose first paragraph heads --help. default: a Config
    whose values the flags override. Ends the program with one line where a value is out of its bounds."""
    import tyro                                                    # 0.2 s, which importing a stage does not pay
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:          # set by nanopath/start.py while torch loads
        signal.signal(signal.SIGINT, signal.default_int_handler)
    args = sys.argv[1:] if args is None else list(args)
    names = [field.name for field in dataclasses.fields(Config)]
    positional = any("Positional" in str(hint) for hint in hints_of(Config).values())
    if args and not args[0].startswith("-") and not positional:
        values = [name for name in names if hints_of(Config)[name] is not bool]
        flag = next(name for name in ("dataset", "prompt", "summary", *values, *names) if name in names)
        example = f"--{flag}={shlex.quote(args[0])}"
        raise SystemExit(f"{args[0]!r} has no flag: write for example {example}. All flags: --help")
    for arg, value in zip(args, args[1:] + [""]):                # tyro's own words for a wrong choice take twenty lines
        name, equals, given = arg.removeprefix("--").partition("=")
        hint = hints_of(Config).get(name.replace("-", "_")) if arg.startswith("--") else None
        value = given if equals else value
        if typing.get_origin(hint) is typing.Literal and value not in map(str, typing.get_args(hint)):
            raise SystemExit(f"--{name}={value}: choose one of {', '.join(map(str, typing.get_args(hint)))}")
    extra, module = {} if default is None else {"default": default}, getattr(sys.modules["__main__"], "__spec__", None)
    if module and module.name.startswith(("data.", "lessons.")):   # started as python -m
        extra["prog"] = f"python -m {module.name}"
    try:
        cfg = tyro.cli(Config, args=args, use_underscores=True, description=doc.split("\n\n")[0], **extra)
        check_bounds(cfg)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    return cfg
