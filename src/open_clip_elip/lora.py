"""LoRA by peft. Its wrapper of `nn.MultiheadAttention` (0.21) merges into the frozen weights and out of them again at
each call, which rounds them, and counts the output projection's part twice; so that class gets another way to run."""
from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

try:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import layer as peft_layers
except ModuleNotFoundError as error:
    raise ValueError("LoRA needs peft; pip install 'open_clip_elip[peft]' brings it.") from error

# Packed attention in OpenCLIP's blocks, and the layers of BERT's attention.
_ATTENTION = r"(.*\.)?resblocks\.\d+\.attn|.*\.(query|key|value)|.*attention\.output\.dense\d?"


class PackedLora(peft_layers.MultiheadAttention):
    """Of packed attention: runs by the weights in effect, and leaves the frozen ones alone."""

    def in_effect(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """See `reduction.attention.in_effect`."""
        attn, (name,) = self.base_layer, self.active_adapters
        out = attn.out_proj
        weight, out_weight = attn.in_proj_weight, out.base_layer.weight
        weight = weight + self.get_delta_weight(name).to(weight.dtype)
        out_weight = out_weight + out.get_delta_weight(name).to(out_weight.dtype)
        return weight, attn.in_proj_bias, out_weight, out.base_layer.bias

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        weight, _, out_weight, _ = self.in_effect()
        weights = {"in_proj_weight": weight, "out_proj.base_layer.weight": out_weight}
        return functional_call(self.base_layer, weights, (query, *args), kwargs)

    def _restore_weights(self) -> None:
        """Nothing is taken away that peft would have to bring back whenever modules are listed."""


def inject(model: nn.Module, rank: int) -> None:
    """Adds W + B A to the weights of all attention, in place: `lora_alpha` is the rank, so that nothing scales it."""
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=_ATTENTION), model)
    for module in model.modules():
        if type(module) is peft_layers.MultiheadAttention:
            module.__class__ = PackedLora
