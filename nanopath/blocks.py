"""
The matrices of a block: which of them read the same input, and which layers can take a factor over from them.
"""
import torch.nn as nn

def wide(x):
    """In float64, which Apple's GPU does not have: there on the CPU."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def parts_of(block):
    """The names of a block's matrices, in the order of the forward pass; those of a part read the same input."""
    names = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
             ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
    there = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    return [tuple(name for name in part if name in there) for part in names]


def foldable(block, config):
    """[(a layer, the matrices that read its output)]. Dividing channel c of the layer by s_c and multiplying column c
    of the matrices by s_c changes nothing, where nothing but a product lies between them.

    The norms feed q, k, v and the MLP. `up` feeds `down` where a gate has the activation. v feeds o, but with grouped
    queries several columns of o would need one s. Never q and k: a norm and RoPE follow them.
    """
    attention, mlp = [f"self_attn.{name}_proj" for name in "qkv"], ["mlp.gate_proj", "mlp.up_proj"]
    mlp = mlp if config.gated else mlp[1:]
    found = [(block.mlp.up_proj, ["mlp.down_proj"])] if config.gated else []
    if config.n_head == config.n_kv_head:
        found.append((block.self_attn.v_proj, ["self_attn.o_proj"]))
    if block.parallel == 1:
        return [*found, (block.input_layernorm, attention + mlp)]
    norm = block.post_attention_layernorm if block.place == "pre" else block.pre_feedforward_layernorm
    found += [(block.input_layernorm, attention), (norm, mlp)]
    return [(layer, names) for layer, names in found if not isinstance(layer, nn.Identity)]


def fold(layer, s):
    """Divide the output channels of a norm or a Linear by s."""
    offset = float(getattr(layer, "offset", False))                # the norms of Gemma multiply by 1 + weight
    divide = s[:, None] if layer.weight.dim() == 2 else s
    layer.weight.copy_((wide(layer.weight) + offset) / divide - offset)
    if getattr(layer, "bias", None) is not None:
        layer.bias.copy_(wide(layer.bias) / s)
