"""A loss whose gradient, curvature and noise are known, for probes to find."""

import math

import torch
from torch import nn

N, SIGMA = 48, 2.0


class Bowl(nn.Module):
    """½ (θ − a)ᵀ H (θ − a) + batch · θ, with θ in two parameters."""

    def __init__(self, seed=0, centre=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        whole = torch.randn(N, generator=generator)
        self.first, self.second = nn.Parameter(whole[:32].view(4, 8)), nn.Parameter(whole[32:])
        root = torch.randn(N, N, generator=generator) / math.sqrt(N)
        self.register_buffer("hessian", root @ root.T)
        self.register_buffer("a", centre * whole.clone())

    @property
    def theta(self):
        return torch.cat([self.first.view(-1), self.second]) - self.a

    def forward(self, batch):
        return self.theta @ self.hessian @ self.theta / 2 + batch @ self.theta

    @torch.no_grad()
    def truth(self):
        """‖g‖², E[d²] and h, of the whole and of both parameters."""
        g, bend = self.hessian @ self.theta, self.hessian.diagonal()
        parts = {"all": slice(0, N), "first": slice(0, 32), "second": slice(32, N)}
        found = {}
        for name, part in parts.items():
            signal = float(g[part].square().sum())
            found[name] = (signal, signal + SIGMA**2 * len(g[part]), float(bend[part].sum()))
        return found

    @torch.no_grad()
    def expected(self):
        """The loss without the noise of a batch."""
        return float(self.theta @ self.hessian @ self.theta / 2)


def batches(seed=0):
    """Noise of the gradient, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield SIGMA * torch.randn(N, generator=generator)
