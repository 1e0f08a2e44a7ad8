"""
The block cache of serve.py: keys and values in blocks of 16 tokens, shared by all requests that begin alike.

    Blocks      which block holds what: reference counts, hashes of prefixes, the least recently used is replaced first
    BlockPool   Blocks with their tensors: blocks <-> the contiguous slots of a KVCache

A request owns a list of blocks, its table: block i holds its tokens 16 i to 16 i + 15. A full block never changes, so
any number of tables may contain it; `users` counts them. Its key is a hash of all tokens up to its end: equal hashes
mean equal keys and values. A block that no table contains keeps its content, and is found by its hash until its memory
is needed.

Papers  PagedAttention (arXiv:2309.06180), hashes of prefixes as in vLLM
"""
import hashlib
from array import array
from collections import OrderedDict, deque

import torch


class Blocks:
    def __init__(self, count, size=16):
        self.count, self.size = count, size
        self.users = [0] * count                                   # how many tables contain the block
        self.key_of = [None] * count                               # the hash of its content; None: unknown or not full
        self.block_of = {}                                         # hash -> block
        self.free = deque(range(count))                            # blocks without content
        self.unused = OrderedDict()                                # full blocks in no table, the oldest first

    @property
    def available(self):
        """How many blocks `take` can give."""
        return len(self.free) + len(self.unused)

    def keys(self, ids, owner="", before=()):
        """The hash of every full block of a text, each including all that precedes it. owner: texts of two owners (such
        as two adapters) share nothing. before: the first hashes, where they are known."""
        keys = list(before)
        for start in range(len(keys) * self.size, len(ids) - self.size + 1, self.size):
            past = keys[-1] if keys else owner.encode("utf-8")
            keys.append(hashlib.blake2b(past + b"\0" + array("q", ids[start:start + self.size]).tobytes(),
                                        digest_size=16).digest())
        return keys

    def find(self, keys):
        """The blocks of the longest known prefix. They may be replaced until they are shared."""
        found = []
        for key in keys:
            if key not in self.block_of:
                break
            found.append(self.block_of[key])
        return found

    def share(self, block):
        """One more table contains the block."""
        self.unused.pop(block, None)
        self.users[block] += 1

    def take(self):
        """A block for one table, with undefined content; None if all blocks are in use."""
        if self.free:
            block = self.free.popleft()
        elif self.unused:
            block, _ = self.unused.popitem(last=False)
            self.forget(block)
        else:
            return None
        assert self.users[block] == 0, (block, self.users[block])
        self.users[block] = 1
        return block

    def publish(self, block, key):
        """The block is full and holds what `key` says. Returns False if another block already holds the same."""
        if key in self.block_of:
            return False
        self.block_of[key], self.key_of[block] = block, key
        return True

    def forget(self, block):
        """Nobody may find the block any more."""
        if self.key_of[block] is not None:
            del self.block_of[self.key_of[block]]
            self.key_of[block] = None

    def clear(self):
        """The weights have changed: no block may be found any more."""
        for block in range(self.count):
            self.forget(block)
        self.free.extend(self.unused)
        self.unused.clear()

    def release(self, table):
        """A table is given up. Its last block is replaced first, because a prefix is useless without its beginning."""
        for block in reversed(table):
            self.users[block] -= 1
            assert self.users[block] >= 0, f"block {block} was released too often"
            if self.users[block] == 0:
                if self.key_of[block] is None:
                    self.free.append(block)
                else:
                    self.unused[block] = None
        table.clear()


class BlockPool(Blocks):
    """keys, values (count, L, K, size, D)."""
    def __init__(self, cache, count, size=16):
        super().__init__(count, size)
        L, _, K, _, D = cache.k.shape
        self.keys_of, self.values_of = (torch.empty(count, L, K, size, D, dtype=cache.k.dtype, device=cache.k.device)
                                        for _ in range(2))

    @property
    def bytes(self):
        return 2 * self.keys_of.numel() * self.keys_of.element_size()

    def save(self, cache, row, index, block):
        """Copy block number `index` of a row of the cache into the pool."""
        start = cache.n + index * self.size
        self.keys_of[block] = cache.k[:, row, :, start:start + self.size]
        self.values_of[block] = cache.v[:, row, :, start:start + self.size]

    def load(self, cache, row, table):
        """Copy the blocks of a table to the beginning of a row of the cache."""
        end = cache.n + len(table) * self.size
        for slots, blocks in ((cache.k, self.keys_of), (cache.v, self.values_of)):
            found = blocks[table].permute(1, 2, 0, 3, 4)           # (L, K, blocks, size, D)
            slots[:, row, :, cache.n:end] = found.flatten(2, 3)
