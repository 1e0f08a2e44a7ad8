"""
Faster implementations of parts of model.py. tests/test_model.py checks that each equals its plain version.

    kernel                   plain version                 why it is faster
    fused_attention          model.attention               the scores (T, S) are never written to memory
    fast_rms_norm            model.rms_norm                one call forward, gradient derived by hand
    chunked_cross_entropy    F.cross_entropy               only a chunk of the logits is in memory at a time
    packed_linear            F.linear                      weights are reordered for the CPU once, not per call
    grouped_experts          the loop in MoE.forward       one matmul for all experts
"""
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
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale).view(B, H, T, D)
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


def pack_weight(weight):
    """The weight (out, in) in the layout of the CPU's matmul. For a small matrix in fp32 that is the transpose (in,
    out), because oneDNN spends 30 us on every call (2026-11-26, 344 x 128, 33 rows: 72 us, the transpose 27,
    F.linear 35)."""
    if weight.dtype == torch.float32 and weight.numel() <= 1 << 18:
        return weight.detach().T.contiguous()
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 16)


def packed_linear(x, packed, bias, out_features):
    """F.linear with a packed weight. A single row is padded to two, because for one row the CPU runs another kernel,
    which rounds differently. Padding costs nothing and makes the result equal to the same row in any larger batch."""
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) == 1:
        rows = rows.expand(2, -1).contiguous()
    if packed.is_mkldnn:
        y = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    else:
        y = rows @ packed if bias is None else torch.addmm(bias, rows, packed)
    return y[:x.numel() // x.shape[-1]].view(*x.shape[:-1], out_features)


def can_pack(device, dtype):
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


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


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of hidden states h (N, C) against targets (N), with at most `rows` rows of logits in memory.

    The gradient of the sum is known in the forward pass already, softmax - one_hot per row, so each chunk of logits
    is turned into its part of dh and dweight at once and freed: N x V numbers are never stored, nothing is recomputed.
    Buffers are allocated once: a CPU spends as long on the page faults of fresh memory as on the arithmetic. For the
    same reason dweight is summed in slices of the vocabulary (2026-11-25, V = 50257: 80 ms against 175 ms per chunk).
    torch's own F.linear_cross_entropy is not used: see bench/results.md.
    """
    SLICE = 4096

    @staticmethod
    def forward(ctx, h, weight, targets, rows, softcap):
        w, wide, shape = weight.to(h.dtype), torch.promote_types(h.dtype, torch.float32), (rows, len(weight))
        total = torch.zeros((), dtype=wide, device=h.device)
        dh = torch.empty_like(h)
        need_dw = ctx.needs_input_grad[1]                          # not where the head is frozen
        dw = torch.zeros(weight.shape, dtype=wide, device=h.device) if need_dw else None
        narrow = torch.empty(shape, dtype=h.dtype, device=h.device)
        logits = narrow if wide == h.dtype else torch.empty(shape, dtype=wide, device=h.device)
        # a CPU's log_softmax can write over its input; the gradient of a softcap needs the logits again
        logprobs = logits if h.device.type == "cpu" and not softcap else torch.empty_like(logits)
        for chunk, y, dchunk in zip(h.split(rows), targets.split(rows), dh.split(rows)):
            n = len(y)
            torch.mm(chunk, w.T, out=narrow[:n])
            z = logits[:n] if logits is narrow else logits[:n].copy_(narrow[:n])
            if softcap:
                z.div_(softcap).tanh_().mul_(softcap)
            counted = (y != -100)[:, None]
            gold = torch.where(counted, y[:, None], 0)
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
                size = ChunkedCrossEntropy.SLICE
                for part, dpart in zip(grad.split(size, dim=1), dw.split(size)):
                    dpart.add_(part.T @ counted_chunk)
        ctx.save_for_backward(dh, dw)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, dtotal):
        dh, dw = ctx.saved_tensors
        dw = None if dw is None else dw.mul_(dtotal).to(ctx.dtype)  # in place: it is large
        return dh.mul_(dtotal), dw, None, None, None


def chunked_cross_entropy(model, x, y, rows):
    """The sum of F.cross_entropy over x (N, C), `rows` rows at a time, with or without gradients."""
    if torch.is_grad_enabled():
        return ChunkedCrossEntropy.apply(x, model.lm_head.weight, y, rows, model.config.logit_softcap)
    return sum(F.cross_entropy(model.logits(part), gold, reduction="sum", ignore_index=-100)
               for part, gold in zip(x.split(rows), y.split(rows)))
