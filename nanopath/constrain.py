"""
Structured output: which tokens may come next, so that every text a model writes is JSON, obeys a JSON schema, or
matches a regular expression.

    what -> nodes of grammar.py -> states, made when they are first met
    state, number of tokens left -> the ids that may follow;   state, id -> the next state

A cell is a node and the cell that must follow it, a linked list, so that sequences need no copying and recursion needs
no limit. A state is the set of cells that the text so far may be in (the subset construction of Thompson 1968); the
states after each of the 256 bytes are one row of a table. The mask over the vocabulary walks all tokens through that
table at once, byte by byte, in numpy: about 10 ms for 50,000 tokens the first time; masks are kept for the next time.
Every cell knows the fewest bytes to its end. A token is only allowed if the text can still be completed afterwards with
the tokens that are left, each of them a single byte: so no output ever stops before its end. Bytes that are no token
of a vocabulary (SmolLM2 lacks some controls) are never written.

Read    Constraint.step and allowed_slowly, then allowed; sample.py uses it: python sample.py --schema=FILE
Papers  masking by an automaton over the vocabulary (Willard and Louf, arXiv:2307.09702)
"""
from bisect import bisect_left
from collections import OrderedDict, defaultdict

import numpy as np
import torch

from nanopath.grammar import NEVER, Expression, Nodes, Schema

MAX_CELLS = 20_000                                                 # in one state
MAX_STATES = 2 ** 18                                               # 1 kB each
MASK_BYTES = 64 << 20                                              # of masks that are kept: about 300 for 50,000 tokens


class Constraint:
    """start: the first state. allowed(state, left) -> ids; step(state, id) -> state; ends(state); shortest, in bytes.

    what: "json", a JSON schema (a dict, True or False), or a regular expression (any other str); `regex` and
    `json_schema` never guess. tokenizer: gives the bytes of each id. ValueError for what is not supported, or what no
    text can satisfy.
    """
    def __init__(self, what, tokenizer, kind=None):
        kind = kind or ("json" if what == "json" else "regex" if isinstance(what, str) else "schema")
        self.nodes = Nodes(sum(1 << token[0] for token in tokenizer.tokens if len(token) == 1))
        try:
            root = Expression(self.nodes, what).parse() if kind == "regex" else \
                Schema(self.nodes, True if kind == "json" else what).parse()
        except RecursionError:
            raise ValueError("this schema or expression is nested too deeply") from None
        if self.nodes.shortest[root] == NEVER:
            lacking = [f"{b:#04x}" for b in range(256) if self.nodes.lacking >> b & 1]
            raise ValueError("no finite text satisfies this schema or expression" + (
                f" with this vocabulary, which has no token for the byte {lacking[0]}" if lacking else ""))
        tokens = sorted(((token, i) for token, i in tokenizer.tokens.items() if token), key=lambda item: item[1])
        self.bytes_of = {i: token for token, i in tokens}
        self.ids = np.array([i for _, i in tokens])
        self.length = np.array([len(token) for token, _ in tokens])
        self.offset = np.cumsum(self.length) - self.length
        self.data = np.frombuffer(b"".join(token for token, _ in tokens), dtype=np.uint8)
        # each group has its own masks: what is left of a maxLength of 30 matters only to tokens of 17 bytes or more
        limits = [0, *(n for n in (4, 8, 16) if n < self.length.max()), int(self.length.max())]
        self.groups = {high: np.flatnonzero((low < self.length) & (self.length <= high))
                       for low, high in zip(limits, limits[1:])}

        self.cells, self.cell_of, self.bytes_left = [None], {}, [0]     # cell 0 is the end of the text
        self.states, self.state_of = [], {}
        self.table = np.full((256, 256), -1, dtype=np.int32)       # state, byte -> state, -1: not allowed
        self.built = np.zeros(256, dtype=bool)                     # which rows of it are filled in
        self.fewest = np.zeros(256, dtype=np.int64)                # state -> fewest bytes to an end
        self.masks, self.held = OrderedDict(), 0                   # masks in the order of their use, their bytes
        self.clipped, self.twins = {}, {}                          # see clip and twin
        self.start = self.state(self.closure([self.cell(root, 0)]))
        self.shortest = int(self.fewest[self.start])

    @classmethod
    def regex(cls, pattern, tokenizer):
        """A regular expression, even where it is the word json."""
        return cls(pattern, tokenizer, "regex")

    @classmethod
    def json_schema(cls, schema, tokenizer):
        """What json.loads returned for a schema: ValueError for a string, a number, a list or null."""
        return cls(schema, tokenizer, "schema")

    def cell(self, node, rest):
        key = (node, rest)
        if key not in self.cell_of:
            self.cell_of[key] = len(self.cells)
            self.cells.append(key)
            self.bytes_left.append(self.nodes.shortest[node] + self.bytes_left[rest])
        return self.cell_of[key]

    def most(self, cell):
        """How often the repeat that a cell begins with may still match."""
        kind = self.nodes.kind[self.cells[cell][0]] if cell else ()
        return 0 if kind[:1] != ("repeat",) else NEVER if kind[3] is None else kind[3]

    def closure(self, cells):
        """The cells that wait for a byte, and the end, that are reached from `cells` without reading a byte."""
        todo, seen, waiting, covered = sorted(cells, key=self.most), set(cells), [], defaultdict(list)
        while todo:
            cell = todo.pop()
            if cell == 0 or self.nodes.kind[self.cells[cell][0]][0] == "bytes":
                waiting.append(cell)
                continue
            node, rest = self.cells[cell]
            kind, *parts = self.nodes.kind[node]
            if kind == "seq":
                for part in reversed(parts):
                    rest = self.cell(part, rest)
                found = [rest]
            elif kind == "alt":
                found = [self.cell(part, rest) for part in parts]
            elif kind == "ref":
                found = [self.cell(self.nodes.target[parts[0]], rest)]
            else:
                part, low, high = parts
                others, most = covered[part, rest], self.most(cell)
                if any(few <= low and most <= many for few, many in others):
                    continue                                       # x{0,4}y adds nothing to x{0,5}y
                others.append((low, most))
                again = self.nodes.repeat(part, max(0, low - 1), high if high is None else high - 1)
                found = [self.cell(part, self.cell(again, rest))] + [rest] * (low == 0)
            for cell in found:
                if cell not in seen and self.bytes_left[cell] < NEVER:
                    seen.add(cell)
                    todo.append(cell)
            if len(seen) > MAX_CELLS:
                raise ValueError(f"this schema or expression is too ambiguous: more than {MAX_CELLS:,} continuations "
                                 "at one place. Simplify repeats of repeats, or long lists of optional properties")
        return tuple(sorted(waiting))

    def state(self, cells):
        """The number of a set of cells; -1 if it is empty."""
        if not cells:
            return -1
        if cells not in self.state_of:
            number = len(self.states)
            if number == MAX_STATES:
                raise ValueError(f"this schema or expression needs more than {MAX_STATES:,} states")
            self.state_of[cells] = number
            self.states.append(cells)
            if number == len(self.table):
                self.table = np.concatenate([self.table, np.full_like(self.table, -1)])
                self.built = np.concatenate([self.built, np.zeros_like(self.built)])
                self.fewest = np.concatenate([self.fewest, np.zeros_like(self.fewest)])
            self.fewest[number] = min(self.bytes_left[cell] for cell in cells)
        return self.state_of[cells]

    def mask_of(self, cell):
        """The bytes that a waiting cell may read; the end reads none."""
        return self.nodes.kind[self.cells[cell][0]][1] if cell else 0

    def after(self, state, byte):
        """The state after one byte, without the table."""
        following = {self.cells[cell][1] for cell in self.states[state] if self.mask_of(cell) >> byte & 1}
        return self.state(self.closure(following)) if following else -1

    def build(self, state):
        """Fill in a row of the table. The bytes are first split into classes that no cell tells apart."""
        classes = [(1 << 256) - 1]
        for mask in {self.mask_of(cell) for cell in self.states[state]}:
            classes = [part for old in classes for part in (old & mask, old & ~mask) if part]
        for part in classes:
            bits = np.unpackbits(np.frombuffer(part.to_bytes(32, "little"), dtype=np.uint8), bitorder="little")
            target = self.after(state, (part & -part).bit_length() - 1)    # before self.table: it may grow
            self.table[state, bits.astype(bool)] = target
        self.built[state] = True

    def step(self, state, token):
        """The state after a token, -1 if the token may not follow (as special tokens never may)."""
        if token not in self.bytes_of:
            return -1
        for b in self.bytes_of[token]:
            if state >= 0:
                state = int(self.table[state, b]) if self.built[state] else self.after(state, b)
        return state

    def ends(self, state):
        """May the text end here?"""
        return self.states[state][0] == 0

    def allowed_slowly(self, state, left):
        """What `allowed` returns, found in the obvious way: try every token, byte by byte."""
        after = [(token, self.step(state, token)) for token in self.bytes_of]
        ids = [token for token, then in after if then >= 0 and self.fewest[then] <= left - 1]
        return torch.tensor(ids, dtype=torch.long)

    def clip(self, cell, limit):
        """The cell with counts that `limit` bytes cannot use up made equal: x{0,900} becomes x{0,17} for 16 bytes."""
        chain = []
        while cell and (cell, limit) not in self.clipped:
            chain.append(cell)
            cell = self.cells[cell][1]
        found = self.clipped[cell, limit] if cell else 0
        for cell in reversed(chain):
            node = self.cells[cell][0]
            kind, *parts = self.nodes.kind[node]
            if kind == "repeat" and parts[2] is not None:
                node = self.nodes.repeat(parts[0], parts[1], min(parts[2], max(parts[1], limit + 1)))
            found = self.clipped[cell, limit] = self.cell(node, found)
        return found

    def twin(self, state, limit):
        """A state that allows the same tokens of at most `limit` bytes: one for all large counts of a maxLength."""
        if (state, limit) not in self.twins:
            cells = tuple(sorted({self.clip(cell, limit) for cell in self.states[state]}))
            self.twins[state, limit] = self.state(cells)
        return self.twins[state, limit]

    def walk(self, state, alive):
        """Those of the tokens `alive` that may follow: ids, and fewest bytes to an end after each, the fewest first."""
        current, at, ids, fewest = np.full(len(alive), state), 0, [alive[:0]], [alive[:0]]
        while len(alive):
            for missing in np.unique(current[~self.built[current]]):
                self.build(int(missing))
            current = self.table[current, self.data[self.offset[alive] + at]]
            live = current >= 0
            alive, current, at = alive[live], current[live], at + 1
            done = self.length[alive] == at
            ids.append(self.ids[alive[done]])
            fewest.append(self.fewest[current[done]])
            alive, current = alive[~done], current[~done]
        ids, fewest = np.concatenate(ids), np.concatenate(fewest)
        order = np.argsort(fewest, kind="stable")
        return ids[order].astype(np.int32), fewest[order]

    def mask(self, state, limit):
        """The tokens of one group that may follow: ids, the numbers of bytes still needed after them, and where
        in `ids` each of these numbers begins."""
        key = self.twin(state, limit), limit
        if key not in self.masks:
            ids, fewest = self.walk(key[0], self.groups[limit])
            values, first = np.unique(fewest, return_index=True)
            self.masks[key] = torch.from_numpy(ids), values.tolist(), [*first.tolist(), len(ids)]
            self.held += ids.nbytes
            while self.held > MASK_BYTES and len(self.masks) > len(self.groups):
                self.held -= self.masks.popitem(last=False)[1][0].nbytes
        self.masks.move_to_end(key)
        return self.masks[key]

    def allowed(self, state, left):
        """Ids that may be the next of `left` tokens, unordered: left - 1 tokens, a byte each, can reach an end then."""
        masks = [self.mask(state, limit) for limit in self.groups]
        return torch.cat([ids[:first[bisect_left(values, left)]] for ids, values, first in masks]).long()
