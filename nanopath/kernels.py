"""
Faster implementations of parts of model.py. tests/test_model.py checks that each equals its plain version.

    kernel                   plain version                 why it is faster
    fused_attention          model.attention               the scores (T, S) are never written to memory
    fast_rms_norm            model.rms_norm                one call forward, gradient derived by hand
    chunked_cross_entropy    F.cross_entropy               only a chunk of the logits is in memory at a time
    PackedLinear             F.linear                      weights are reordered for the CPU once, not per call
    Int8Linear               round_rows, then F.linear     integer products, a quarter of the bytes of float32
    Int4Linear               dequantize, then F.linear     an eighth of the bytes, dequantized inside the product
    Dequantized              dequantize, then F.linear     dequantized once, where no kernel fits
    Part                     one product per Linear        q, k, v and gate, up read the same rows: rounded once
    grouped_experts          the loop in MoE.forward       one matmul for all experts
"""
import warnings

import torch
import torch.nn.functional as F


def fused_attention_pays(device_type, dtype, T):
    """Whether torch's fused attention trains faster than model.attention, over T keys.

    It is faster except in bf16 on a CPU in short contexts. Time of fused / plain, forward and backward, 2026-11-25,
    one core with AMX, H = 12 and H = 2:
    16 x 128: 2.4, 2.9    8 x 256: 1.1, 1.6    4 x 512: 0.8, 1.3    1 x 1024: 0.8, 0.8
    """
    return device_type != "cpu" or dtype != torch.bfloat16 or T >= 512


def fused_attention(q, k, v, mask=None, causal=False, scale=None, softcap=0.0):
    """model.attention by torch's kernel, which has no softcap. For one query without gradients the heads of a group are
    passed in the time dimension, so that keys and values are not copied for every head."""
    assert not softcap, "torch's attention has no softcap"
    B, H, T, D = q.shape
    groups = H // k.shape[1]
    if T == 1 and groups > 1 and not q.requires_grad:
        if mask is not None and mask.shape[1] > 1:                 # ALiBi: a mask per head
            mask = mask.view(len(mask), -1, groups, mask.shape[-1])
        grouped = q.view(B, -1, groups, D)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale).reshape(B, H, T, D)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=groups > 1)


class RMSNormFunction(torch.autograd.Function):
    """y = n w with n = x r, r = 1 / sqrt(mean(x^2) + eps), all in float32, and the gradient derived by hand.

    offset: w is 1 + weight.

    dw = sum over rows of dy n;  dx = r (dy w - n mean(dy w n)). Autograd would need a dozen passes over memory.
    """
    @staticmethod
    def forward(ctx, x, weight, eps, offset=False):
        wide = torch.promote_types(x.dtype, torch.float32)         # bf16 is summed in float32
        w, n = 1 + weight.to(wide) if offset else weight.to(x.dtype).to(wide), x.to(wide)
        r = (n.square().mean(-1, keepdim=True) + eps).rsqrt()
        n = n * r
        ctx.save_for_backward(n, r, w)
        ctx.dtypes = x.dtype, weight.dtype
        return (n * w).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        n, r, w = ctx.saved_tensors
        dy = dy.to(n.dtype)
        dyn = dy * n
        mean = (dyn @ w).unsqueeze(-1) / len(w)
        dx = torch.addcmul(dy * w, n, mean, value=-1).mul_(r)
        return dx.to(ctx.dtypes[0]), dyn.flatten(0, -2).sum(0).to(ctx.dtypes[1]), None, None


def fast_rms_norm(x, weight, eps, offset=False):
    """The same as model.rms_norm; with and without gradients the results are equal bit for bit.

    On a CPU, F.rms_norm does the operations of RMSNormFunction in the same order, and is faster where no gradient is
    needed. Other devices have a fused kernel that rounds differently, so it is not used there."""
    if not torch.is_grad_enabled() and x.device.type == "cpu" and not offset:
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    return RMSNormFunction.apply(x, weight, eps, offset)


class PackedLinear:
    """F.linear with a weight (out, in) in the layout of the CPU's matmul. For a small matrix in fp32 that is the
    transpose (in, out), because oneDNN spends 30 us on every call (2026-11-26, 344 x 128, 33 rows: 72 us, the transpose
    27, F.linear 35).

    A single row is padded to two, because for one row the CPU runs another kernel, which rounds differently. Padding
    costs nothing and makes the result equal to the same row in any larger batch.
    """
    def __init__(self, weight, bias, dtype):
        weight = weight.detach().to(dtype)
        small = dtype == torch.float32 and weight.numel() <= 1 << 18
        reordered = torch.ops.mkldnn._reorder_linear_weight
        self.packed = weight.T.contiguous() if small else reordered(weight.contiguous(), 16)
        self.bias, self.out_features = None if bias is None else bias.detach().to(dtype), len(weight)

    def __call__(self, x):
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) == 1:
            rows = rows.expand(2, -1).contiguous()
        if self.packed.is_mkldnn:
            y = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
        else:
            y = rows @ self.packed if self.bias is None else torch.addmm(self.bias, rows, self.packed)
        return y[:x.numel() // x.shape[-1]].view(*x.shape[:-1], self.out_features)


def can_pack(device, dtype):
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def round_rows(x, levels=127):
    """x (..., K) rounded to -levels..levels times one scale per row, its largest magnitude / levels. The gradient is
    that of a function that rounds nothing."""
    scale = x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-30) / levels
    return x + ((x.detach() / scale).round() * scale - x.detach())


class Int8Linear:
    """y = x W^T with integer weights and activations, both rounded to int8: 8e-3 relative error against float32.

    The kernel has one scale for all of x. So each row is divided by its largest magnitude first, and the result is
    multiplied by it again: one scale per row. Sums of integers are exact in any order, and no row has part in another
    one's scale: a row's result does not depend on the number of rows or on what they hold.
    Without VNNI the processor adds pairs of products in 16 bits, which 255 * 127 * 2 exceeds: activations get 7 bits.
    """
    def __init__(self, q, scale, bias):
        zero = torch.zeros(len(q), dtype=torch.int64)
        with warnings.catch_warnings():                            # torch will remove this type of tensor one day
            warnings.simplefilter("ignore", UserWarning)
            weight = torch._make_per_channel_quantized_tensor(q, scale.detach().flatten().double(), zero, 0)
        self.packed = torch.ops.quantized.linear_prepack(weight, None)
        self.bias = None if bias is None else bias.detach().float()
        self.levels = 127 if torch.cpu._is_vnni_supported() else 63

    @classmethod
    def of(cls, weight, bias):
        """The weight (out, in) of a Linear, rounded to int8 with one scale per row."""
        weight = weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        return cls((weight / scale).round().to(torch.int8), scale, bias)

    def __call__(self, x):
        rows = x.float()
        largest = rows.abs().amax(-1, keepdim=True).clamp_(min=1e-30)
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            rows / largest, 1 / self.levels, self.levels + 1, self.packed)
        y = y.mul_(largest) if self.bias is None else torch.addcmul(self.bias, y, largest)
        return y.to(x.dtype)


class Int4Linear:
    """y = x W^T with 4-bit weights, computed in bf16: 4e-3 relative error against float32.

    x (B, T, K): below `MANY` tokens T each weight is dequantized inside the product. The time of this kernel grows with
    the number of rows, so for a long prompt the matrix is dequantized once, in bf16, then multiplied by one text at a
    time. The choice depends on T, never on B: while tokens are generated T is 1, so no result depends on other texts.
    Time of both, 2304 x 768, one core with AMX, 2026-11-26, ms: T=32 1.3, 1.9   T=64 2.6, 2.1   T=512 21, 3.4
    """
    MANY = 64

    def __init__(self, linear):
        N, K, G = linear.out_features, linear.in_features, int4_group(linear)
        q = torch.stack([linear.q & 15, linear.q >> 4], dim=-1).flatten(1)                   # (N, K)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)         # (N, K / 2) bytes
        scale = linear.scale.float()
        zero = (8 - linear.zero.float()) * scale                   # the kernel computes (q - 8) scale + zero
        pair = torch.stack([scale, zero], dim=-1).repeat_interleave(linear.group // G, dim=1)          # (N, K / G, 2)
        self.table, self.group = pair.transpose(0, 1).contiguous().bfloat16(), G             # (K / G, N, 2)
        self.bias = None if linear.bias is None else linear.bias.detach().bfloat16()
        bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.wide = torch.bfloat16 if bf16 else torch.float32      # of the product with a dequantized matrix
        self.known = N % 64 == 0 and torch.equal(self.codes(torch.int8).view(K, N) + 8, q.T)

    def codes(self, dtype):
        """q - 8 of the packed matrix, (K / G, G, N). The layout, on processors with AVX-512: blocks of 64 rows; in a
        block, byte (k, j) holds row j of column k in its low four bits and row j + 32 in its high ones."""
        size, N = self.packed.shape
        N, K = size, 2 * N
        packed = self.packed.view(N // 64, K, 32).transpose(0, 1)                            # (K, N / 64, 32)
        out = torch.empty(K, N // 64, 64, dtype=dtype)
        torch.sub((packed & 15).view(torch.int8), 8, out=out[..., :32])
        torch.sub((packed >> 4).view(torch.int8), 8, out=out[..., 32:])
        return out.view(K // self.group, self.group, N)

    def __call__(self, x):
        if x.dim() > 2 and x.shape[-2] >= self.MANY and self.known:
            scale, zero = self.table.to(self.wide).permute(2, 0, 1).contiguous()[:, :, None]      # (K / G, 1, N)
            weight = self.codes(self.wide)
            torch.addcmul(zero, weight, scale, out=weight)
            weight, rows = weight.flatten(0, 1), x.to(self.wide).flatten(0, -3)
            y = torch.stack([row @ weight for row in rows]).view(*x.shape[:-1], -1)
        else:
            rows = x.reshape(-1, x.shape[-1]).bfloat16()
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, self.group, self.table)
            y = y.view(*x.shape[:-1], -1)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class Int4LinearCUDA:
    """The same on a CUDA device: its kernel packs another layout, from bytes whose even column is in the high bits
    (tests/test_cuda.py)."""
    def __init__(self, linear):
        N, G, tiles = linear.out_features, int4_group(linear), 8
        while linear.in_features % (16 * tiles):
            tiles //= 2
        swapped = (linear.q & 15) << 4 | linear.q >> 4
        self.packed = torch.ops.aten._convert_weight_to_int4pack(swapped.contiguous(), tiles)
        scale = linear.scale.float()
        pair = torch.stack([scale, (8 - linear.zero.float()) * scale], dim=-1)
        pair = pair.repeat_interleave(linear.group // G, dim=1)
        self.table, self.group, self.N = pair.transpose(0, 1).contiguous().bfloat16(), G, N
        self.bias = None if linear.bias is None else linear.bias.detach().bfloat16()

    def __call__(self, x):
        rows = x.reshape(-1, x.shape[-1]).bfloat16().contiguous()
        y = torch.ops.aten._weight_int4pack_mm(rows, self.packed, self.group, self.table)
        y = y.view(*x.shape[:-1], self.N)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class Dequantized:
    """The weight of a quantized Linear, computed once: as fast, and as large, as a Linear of this dtype."""
    def __init__(self, linear, dtype):
        self.weight, self.act_bits = linear.dequantize(dtype), getattr(linear, "act_bits", 0)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.product = None
        if can_pack(self.weight.device, dtype):
            self.product, self.weight = PackedLinear(self.weight, self.bias, dtype), None

    def __call__(self, x):
        x = round_rows(x) if self.act_bits else x
        return F.linear(x, self.weight, self.bias) if self.product is None else self.product(x)


def int4_group(linear):
    """The largest group that the int4 kernels know and that divides the layer's, or 0. Scales are then repeated."""
    return next((size for size in (256, 128, 64, 32) if linear.group % size == 0), 0)


def has_int8():
    """Whether torch's integer product runs here, which is FBGEMM's."""
    return torch.backends.quantized.engine in ("x86", "fbgemm") and torch.backends.cpu.get_cpu_capability()[:3] == "AVX"


def pack_quantized(linear, dtype):
    """The fastest product of a QuantLinear on its device, for activations of this dtype: a function of x (..., K).

    Where no kernel of torch fits, its weight is dequantized once: float64, MPS, int8 in groups or on CUDA, a group or a
    shape that the int4 kernel does not know.
    """
    N, K, device = linear.out_features, linear.in_features, linear.q.device
    fits = linear.bits == 4 and not linear.act_bits and int4_group(linear) and dtype in (torch.float32, torch.bfloat16)
    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16):
        if linear.bits == 8 and linear.group == K and has_int8():
            return Int8Linear(linear.q, linear.scale, linear.bias)
        if fits and N % 16 == 0 and torch.backends.cpu.get_cpu_capability()[:3] == "AVX":
            return Int4Linear(linear)
    if fits and device.type == "cuda" and N % 8 == 0 and torch.cuda.get_device_capability(device) >= (8, 0):
        return Int4LinearCUDA(linear)
    return Dequantized(linear, dtype)


class Part:
    """Columns start to end of a product that several QuantLinears share because they read the same input, such as q, k
    and v. Whichever is called computes it for all; the others take their columns if their input is the same tensor. The
    first one always computes, and the last one forgets the result.
    """
    def __init__(self, product, memory, start, end, final):
        self.product, self.memory, self.start, self.end, self.final = product, memory, start, end, final

    def __call__(self, x):
        found = self.memory[0] if self.start else None
        if found is None or found[0] is not x:
            found = x, self.product(x)
        self.memory[0] = None if self.final else found
        return found[1][..., self.start:self.end]


def pack_together(linears, dtype):
    """Pack QuantLinears that read the same input as one: their input is rounded once and the kernel called once. Only
    where they are stored alike and the CPU has a kernel; otherwise nothing is changed."""
    kinds = {(m.bits, m.act_bits, m.group, m.bias is None, m.packed) if hasattr(m, "act_bits") else () for m in linears}
    if len(linears) < 2 or len(kinds) > 1 or kinds == {()} or linears[0].packed or linears[0].q.device.type != "cpu":
        return
    tensors = ([getattr(m, name) for m in linears] for name in ("q", "scale", "zero", "bias"))
    q, scale, zero, bias = (None if parts[0] is None else torch.cat(parts) for parts in tensors)
    product = pack_quantized(type(linears[0])(q, scale, zero, bias, linears[0].bits, linears[0].act_bits), dtype)
    if not isinstance(product, Dequantized):
        memory, start = [None], 0
        for linear in linears:
            end = start + linear.out_features
            linear.pack(dtype, Part(product, memory, start, end, linear is linears[-1]))
            start = end


def grouped_experts(moe, flat, weight, chosen):
    """All experts of a gated MoE in bf16 at once. flat (N, C), weight and chosen (N, k) -> (N, C).

    The (token, expert) pairs are sorted by expert, then each of the three matrices is one grouped matmul. No shape
    depends on the data, so torch.compile needs no graph break.
    """
    order = chosen.flatten().argsort(stable=True)                  # (N k), the pairs of expert 0 first
    token, ends = order // moe.k, moe.load.cumsum(0).to(torch.int32)
    gate, up, down = (torch.stack([getattr(e, name).weight for e in moe.experts]).to(flat.dtype).mT      # (E, in, out)
                      for name in ("gate_proj", "up_proj", "down_proj"))
    rows = flat[token]
    hidden = moe.experts[0].act(F.grouped_mm(rows, gate, offs=ends)) * F.grouped_mm(rows, up, offs=ends)
    out = F.grouped_mm(hidden, down, offs=ends) * weight.flatten()[order, None].to(flat.dtype)
    return torch.zeros_like(flat).index_add(0, token, out)


def rows_of_logits(most, V, device):
    """How many rows of V logits the loss computes at a time: `most` numbers on a CPU; on a GPU, which needs larger
    products, 8 times as many, and a power of two of rows, so that all parts have one size."""
    rows = max(1, most // V)
    return rows if device.type == "cpu" else 1 << (8 * rows).bit_length() - 1


def loss_and_gradient(z, gold, counted, softcap):
    """Logits z (n, V), gold and counted (n, 1) -> the summed cross-entropy of the counted rows, and its gradient in z's
    dtype. Slow in eager mode; torch.compile fuses it into few passes over z (head and loss, H200: 30.6 -> 17.9 ms).
    """
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    bent = torch.tanh(wide / softcap) if softcap else None
    logprobs = torch.log_softmax(softcap * bent if softcap else wide, dim=-1)
    loss = -(logprobs.gather(1, gold) * counted).sum()
    grad = logprobs.exp() - (torch.arange(z.shape[1], device=z.device) == gold).to(wide.dtype)
    grad = grad * (1 - bent.square()) if softcap else grad
    return loss, (grad * counted).to(z.dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of hidden states h (N, C) against targets (N), with at most `rows` rows of logits in memory.

    The gradient of the sum is known in the forward pass already, softmax - one_hot per row, so each chunk of logits
    is turned into its part of dh and dweight at once and freed: N x V numbers are never stored, nothing is recomputed.
    Buffers are allocated once: a CPU spends as long on the page faults of fresh memory as on the arithmetic. For the
    same reason dweight is summed in slices of the vocabulary (2026-11-25, V = 50257: 80 ms against 175 ms per chunk).
    torch's own F.linear_cross_entropy is not used: see bench/results.md.
    compiled: loss_and_gradient through torch.compile, where training compiles on a GPU; else None.
    """
    SLICE = 4096

    @staticmethod
    def forward(ctx, h, weight, targets, rows, softcap, compiled=None):
        w, wide, shape = weight.to(h.dtype), torch.promote_types(h.dtype, torch.float32), (rows, len(weight))
        total = torch.zeros((), dtype=wide, device=h.device)
        dh = torch.empty_like(h)
        need_dw = ctx.needs_input_grad[1]                          # not where the head is frozen
        dw = torch.zeros(weight.shape, dtype=wide, device=h.device) if need_dw else None
        narrow = torch.empty(shape if compiled is None else (0, 0), dtype=h.dtype, device=h.device)
        logits = narrow if wide == h.dtype or compiled else torch.empty(shape, dtype=wide, device=h.device)
        # a CPU's log_softmax can write over its input; the gradient of a softcap needs the logits again
        logprobs = logits if h.device.type == "cpu" and not softcap else torch.empty_like(logits)
        for chunk, y, dchunk in zip(h.split(rows), targets.split(rows), dh.split(rows)):
            n, counted = len(y), (y != -100)[:, None]
            gold = torch.where(counted, y[:, None], 0)
            if compiled is not None:
                loss, grad = compiled(chunk @ w.T, gold, counted, softcap)
                total += loss
                torch.mm(grad, w, out=dchunk)
                if dw is not None:
                    dw += grad.T @ chunk
                continue
            torch.mm(chunk, w.T, out=narrow[:n])
            z = logits[:n] if logits is narrow else logits[:n].copy_(narrow[:n])
            if softcap:
                z.div_(softcap).tanh_().mul_(softcap)
            p = torch.log_softmax(z, dim=-1, out=logprobs[:n])
            total -= (p.gather(1, gold) * counted).sum()
            grad = p.exp_().scatter_add_(1, gold, -torch.ones_like(gold, dtype=wide))
            if softcap:
                grad.mul_(1 - (z / softcap).square())
            if wide != h.dtype:
                grad = narrow[:n].copy_(grad)
            dchunk.copy_((grad @ w) * counted)  # masked here, where a row has C numbers, not V
            if dw is not None:
                counted_chunk = chunk * counted
                size = ChunkedCrossEntropy.SLICE if h.device.type == "cpu" else grad.shape[1]
                for part, dpart in zip(grad.split(size, dim=1), dw.split(size)):
                    dpart.add_(part.T @ counted_chunk)
        ctx.save_for_backward(dh, dw)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, dtotal):
        dh, dw = ctx.saved_tensors
        dw = None if dw is None else dw.mul_(dtotal).to(ctx.dtype)  # in place: it is large
        return dh.mul_(dtotal), dw, None, None, None, None


def chunked_cross_entropy(model, x, y, rows):
    """The sum of F.cross_entropy over x (N, C), `rows` rows at a time, with or without gradients."""
    if torch.is_grad_enabled():
        cap, compiled = model.config.logit_softcap, model.compiled_loss
        return ChunkedCrossEntropy.apply(x, model.lm_head.weight, y, rows, cap, compiled)
    return sum(F.cross_entropy(model.logits(part), gold, reduction="sum", ignore_index=-100)
               for part, gold in zip(x.split(rows), y.split(rows)))
