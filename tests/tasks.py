"""The two tasks of the exercises in docs/course.md. In the folder of the layers:

    import sys
    sys.path.append("tests")
    from tasks import copying, delay
"""

import torch
from torch import nn


def delay(layer, steps=150, lag=10, h=4):
    """Train layer, of h features, to delay noise by lag steps -> loss, at first about 1."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(steps):
        u = torch.randn(4, h, 64)                               # new signals at each step
        y, _ = layer(u)
        loss = (y[..., lag:] - u[..., :-lag]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


def copying(layer, steps=150):
    """Train layer, of 8 features, to keep the last flagged value -> loss, network."""
    net = nn.Sequential(nn.Conv1d(2, 8, 1), layer, nn.Conv1d(8, 1, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    losses = []
    for _ in range(steps):
        value = torch.randn(16, 64)
        flag = torch.rand(16, 64) < 0.1
        flag[:, 0] = True
        last = torch.where(flag, torch.arange(64), 0).cummax(1).values  # its position
        y, _ = layer(net[0](torch.stack([value, flag.float()], 1)))
        loss = (net[2](y)[:, 0] - value.gather(1, last)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10, net
