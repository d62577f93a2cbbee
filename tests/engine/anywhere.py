"""Parameters in every layout and on several devices, for tests of several rooms."""

import torch
from torch import nn


class There(torch.Tensor):
    """A tensor of another device: one that the ops take for that, with the memory of this one."""

    device = property(lambda self: torch.device("cpu", 1))


def plain(t):
    """The numbers of a tensor, wherever and however they lie, as those of a row-major one here."""
    return t.detach().as_subclass(torch.Tensor).contiguous()


class Net(nn.Module):
    """Convolutions, a matrix and a norm; small enough to be filled together, but for one."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Conv2d(3, 8, 3)
        self.large = nn.Conv2d(8, 70, (5, 6))
        self.matrix = nn.Linear(70, 6)
        self.norm = nn.LayerNorm(6)
        self.wide = nn.Linear(6, 5, bias=False)
        self.to(dtype)
        self.x = torch.randint(-2, 3, (4, 3, 7, 8), generator=torch.manual_seed(3)).to(dtype)

    def forward(self):
        h = self.large(self.first(self.x).relu()).flatten(1)
        return self.wide(self.norm(self.matrix(h)))


def relaid(model):
    """The model with the same weights, none of its matrices and convolutions row-major."""
    model.first.to(memory_format=torch.channels_last)
    model.large.to(memory_format=torch.channels_last)
    model.matrix.weight.data = model.matrix.weight.data.t().contiguous().t()
    # Columns of a memory that has others, too.
    fused = torch.zeros(5, 15, dtype=model.wide.weight.dtype)
    fused[:, 3:9] = model.wide.weight.data
    model.wide.weight.data = fused[:, 3:9]
    odd = [n for n, p in model.named_parameters() if not p.is_contiguous()]
    assert odd == ["first.weight", "large.weight", "matrix.weight", "wide.weight"]
    return model


def elsewhere(model):
    """The model with its later half on another device."""
    for module in (model.matrix, model.norm, model.wide):
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(p.data.as_subclass(There))
    return model


LAYOUTS = {
    "layouts": relaid,
    "devices": elsewhere,
    "both": lambda model: elsewhere(relaid(model)),
}
