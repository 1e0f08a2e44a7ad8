"""
Several LoRA adapters beside one base model: every row of a batch has its own, or none.

    y = W x + scale B A x    W is multiplied with all rows at once, A and B with the rows of their adapter

A row's result is that of the model with only this adapter in it (finetune_lora.LoRALinear), bit for bit where the
matmul's rows are independent of each other (GPT.pack).
"""
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from bpe import Tokenizer
from data.tokenizer_files import TOKENIZER_FILES
from nanopath import kernels
from nanopath.hf import add_stop_ids
from nanopath.hub import find_folder
from nanopath.peft import find_base, read_adapter, weights_hash


class Adapted(nn.Module):
    """Takes the place of a Linear. parts: {adapter: (A, B, scale)}; groups: [(adapter, its rows, None for all)]."""
    def __init__(self, base, groups):
        super().__init__()
        self.base, self.groups, self.parts = base, groups, {}
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        y = self.base(x)
        for name, rows in self.groups:
            if name in self.parts:
                A, B, scale = self.parts[name]
                if rows is None:
                    y = y + B(A(x) * scale)
                else:
                    y[rows] = y[rows] + B(A(x[rows]) * scale)
        return y


def product(weight, device, dtype):
    """The function x -> W x, with a packed weight where that is possible."""
    weight = weight.to(device, dtype)
    if kernels.can_pack(device, dtype):
        return kernels.PackedLinear(weight, None, dtype)
    return partial(F.linear, weight=weight)


class Adapters:
    def __init__(self, model, folders, place=None):
        """Put the adapters of these folders, {name: folder}, into the model, all switched off. place: the folder of the
        model, to compare its weights with those that an adapter was trained on. ValueError for what is no LoRA adapter
        of this model. stop_ids and tokenizers {name: ...} say what ends a text of an adapter and how its chats look.
        The folder of an adapter may have no tokenizer."""
        self.names, self.groups, self.stop_ids, self.tokenizers = list(folders), [], {}, {}
        device, saved = model.embed_tokens.weight.device, {}
        for name, folder in folders.items():                       # all are read before the model is changed
            base, quantization = find_base(find_folder(folder))
            if place is not None and weights_hash(base) != weights_hash(find_folder(place)):
                raise ValueError(f"adapter {name}: {folder} was trained on {base}, whose weights are not those of "
                                 f"{place}. Serve it alone: --model={folder}")
            saved[name] = found = read_adapter(find_folder(folder), model, base)
            extra = [key for key in found.tensors if not key.endswith((".A.weight", ".B.weight"))]
            if found.method != "lora" or extra or quantization:
                what = f"quantization {quantization}" if quantization else f"method {found.method}" \
                    if found.method != "lora" else f"the tensor {extra[0]}"
                raise ValueError(f"adapter {name}: {folder} has {what}; beside others only plain LoRA is possible. "
                                 f"Serve it alone: --model={folder}")
        for name, found in saved.items():
            folder = find_folder(folders[name])
            self.stop_ids[name] = add_stop_ids(model.config, folder).stop_ids
            if any((folder / file).is_file() for file in TOKENIZER_FILES):
                self.tokenizers[name] = Tokenizer.load(folder)
            for target in found.targets:
                module = model.get_submodule(target)
                if not isinstance(module, Adapted):
                    parent, _, last = target.rpartition(".")
                    module = Adapted(module, self.groups)
                    setattr(model.get_submodule(parent), last, module)
                A, B = (product(found.tensors[f"{target}.{part}.weight"], device, model.dtype) for part in "AB")
                module.parts[name] = A, B, found.scales[target]

    def select(self, names):
        """The adapter of each row of the next pass, None where it has none."""
        kinds = dict.fromkeys(names)
        self.groups[:] = [(kind, None if len(kinds) == 1 else [i for i, name in enumerate(names) if name == kind])
                          for kind in kinds if kind is not None]
