"""Models with adapters that are not zero, and what they must be equal to."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from open_clip_elip.adapters import Bottleneck, adapt, is_adapter, merged

from .tiny import seeded

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def adapted(model: nn.Module, kind: str) -> nn.Module:
    """With adapters of rank 3 that are not zero, and all the same for the same model."""
    adapt(model, kind, 3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if is_adapter(name):
                p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def reference(plain: nn.Module, model: nn.Module, kind: str):
    """`plain` with `model`'s adapters, which get the gradients: its own weights with B A added to them, or hooks."""
    parameters = dict(model.named_parameters())
    with_names = {name.replace("base_layer.", ""): p for name, p in parameters.items()}
    if kind == "lora":
        effective = merged({name: p for name, p in with_names.items()})
        return lambda function: functional_call(Calls(plain, function), {f"m.{k}": v for k, v in effective.items()}, ())
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Bottleneck):

            def put(m, args, down=module.adapter_down, up=module.adapter_up):
                return args[0] + up(F.gelu(down(args[0])))

            place = plain.get_submodule(name)
            if not place._forward_pre_hooks:
                place.register_forward_pre_hook(put)
    plain.load_state_dict(model.state_dict(), strict=False)
    return lambda function: function(plain)


class Calls(nn.Module):
    def __init__(self, m: nn.Module, function):
        super().__init__()
        self.m, self.function = m, function

    def forward(self):
        return self.function(self.m)


def assert_same_step(model: nn.Module, plain: nn.Module, kind: str, loss) -> None:
    """`loss` of the adapted model, and its gradients, are the reference's."""
    run = reference(plain, model, kind)
    expected = seeded(lambda: run(loss))
    expected.backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if is_adapter(name) and p.grad is not None}
    model.zero_grad()
    found = seeded(loss, model)
    found.backward()
    torch.testing.assert_close(found, expected, **CLOSE)
    own = {name: p.grad for name, p in model.named_parameters() if is_adapter(name) and p.grad is not None}
    assert own.keys() == wanted.keys() == {name for name in trained if is_adapter(name) and name in own}
    assert all(gradient.any() for gradient in own.values()) and len(own) > 8
    torch.testing.assert_close(own, wanted, **CLOSE)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
