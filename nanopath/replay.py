"""
One decoding step as a CUDA graph: its kernels are recorded once, then launched by a single call.

A step that writes one token per row is a few hundred kernels of a few microseconds. A GPU finishes them faster than
Python can launch them, so sampling is no faster on a large GPU than on a small one. A recorded step needs shapes and
addresses that never change: the slot of each row's token is read from a buffer, and attention reads all slots and masks
those after it (Replay.begin, in the place of KVCache.begin). The numbers are those of the step it records, up to the
order of additions. Between two steps of one text the model must stay as it is, except for in-place updates of its
weights: a recorded step sees no other adapter, no packing and no move.
"""
import torch


def can_replay(model, cache):
    """Whether a step of this model and cache can be recorded: no Python decision may depend on a value on the GPU."""
    return cache.k.device.type == "cuda" and not model.config.n_expert and not model.dynamic


class Replay:
    """A step of `model` for the rows of a KVCache. record=False runs it without a graph, on any device: for tests."""
    def __init__(self, model, cache, record=True):
        self.model, self.cache, self.record = model, cache, record
        self.inputs = torch.zeros(2, cache.k.shape[1], 1, dtype=torch.long, device=cache.k.device)   # ids; slots
        self.graph = self.out = None

    def fits(self, cache):
        """False for another cache, and after KVCache.keep moved this one to larger memory."""
        return cache is self.cache and cache.k.shape[1] == self.inputs.shape[1]

    def begin(self, cache):
        """As KVCache.begin, for one token per row."""
        slots = self.inputs[1]                                     # (B, 1)
        cache.even, cache.end_slot, cache.positions, cache.counts = False, cache.n + cache.size, slots, []
        cache.first_slot, masks = dict.fromkeys(cache.windows, 0), {}
        for window in cache.first_slot:
            keys = cache.slots(window)
            seen = keys <= slots[..., None]                        # (B, 1, S)
            masks[window] = (seen & (keys > slots[..., None] - window) if window else seen)[:, None]
        return slots, masks

    def run(self):
        self.cache.steady = self
        try:
            return self.model(self.inputs[0], cache=self.cache, last=True)
        finally:
            self.cache.steady = None

    def capture(self):
        """Returns the graph and the tensor that its replay fills. The step first runs once on a side stream: libraries
        choose kernels and allocate memory at their first call, which cannot be recorded."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = self.run()
        return graph, out

    def step(self, ids):
        """ids: one per row of the cache. Returns their logits (B, V), valid until the next step."""
        cache = self.cache
        if max(cache.lengths) >= cache.size:
            raise ValueError(f"{max(cache.lengths) + 1} tokens do not fit in a cache of {cache.size}")
        pad = [0] * (self.inputs.shape[1] - len(ids))              # rows that have left: nobody reads what they write
        slots = [cache.n + length for length in cache.lengths]
        self.inputs.copy_(torch.tensor([ids + pad, slots + pad])[..., None])
        if not self.record:
            self.out = self.run()
        else:
            with torch.cuda.device(cache.k.device):
                if self.graph is None:
                    self.graph, self.out = self.capture()
                self.graph.replay()
        cache.lengths = [length + 1 for length in cache.lengths]
        return self.out[:len(ids)]
