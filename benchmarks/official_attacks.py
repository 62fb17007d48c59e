"""The attacks of PGD, TRADES, MART and FAT as their authors' code takes them: ours are held against these.

``noise`` is what the start adds to ``x``, for :func:`fat_linf` also what each step adds, ``[1 + steps, n, ...]``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def trades_linf(net: nn.Module, x: Tensor, noise: Tensor, eps: float, step_size: float, steps: int) -> Tensor:
    """trades.py of yaodongyu/TRADES, distance 'l_inf'."""
    x_adv = x.detach() + noise
    for _ in range(steps):
        x_adv.requires_grad_()
        loss_kl = F.kl_div(F.log_softmax(net(x_adv), dim=1), F.softmax(net(x), dim=1), reduction="sum")
        (grad,) = torch.autograd.grad(loss_kl, [x_adv])
        x_adv = x_adv.detach() + step_size * torch.sign(grad.detach())
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps)
        x_adv = torch.clamp(x_adv, 0.0, 1.0)
    return x_adv


def trades_l2(net: nn.Module, x: Tensor, noise: Tensor, eps: float, steps: int) -> Tensor:
    """trades.py of yaodongyu/TRADES, distance 'l_2'."""
    delta = noise.clone().requires_grad_()
    optimizer = torch.optim.SGD([delta], lr=eps / steps * 2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -F.kl_div(F.log_softmax(net(x + delta), dim=1), F.softmax(net(x), dim=1), reduction="sum")
        loss.backward()
        grad_norms = delta.grad.view(len(x), -1).norm(p=2, dim=1)  # type: ignore[union-attr]
        delta.grad.div_(grad_norms.view(-1, 1, 1, 1))  # type: ignore[union-attr]
        optimizer.step()
        delta.data.add_(x)
        delta.data.clamp_(0, 1).sub_(x)
        delta.data.renorm_(p=2, dim=0, maxnorm=eps)
    return (x + delta).detach()


def mart_linf(net: nn.Module, x: Tensor, y: Tensor, noise: Tensor, eps: float, step_size: float, steps: int) -> Tensor:
    """mart.py of YisenWang/MART."""
    x_adv = x.detach() + noise
    for _ in range(steps):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(net(x_adv), y), [x_adv])
        x_adv = x_adv.detach() + step_size * torch.sign(grad.detach())
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps)
        x_adv = torch.clamp(x_adv, 0.0, 1.0)
    return x_adv


def fat_linf(net: nn.Module, x: Tensor, y: Tensor, noise: Tensor, eps: float, step_size: float, tau: int) -> Tensor:
    """earlystop.py of zjfheart/Friendly-Adversarial-Training, kept in the order of the batch."""
    iter_adv, found = (x + noise[0]).clamp(0.0, 1.0), x.clone()
    control = torch.full((len(x),), tau)
    rows = torch.arange(len(x))
    for step in range(len(noise) - 1):
        iter_adv.requires_grad_()
        output = net(iter_adv)
        (grad,) = torch.autograd.grad(F.cross_entropy(output, y[rows]), [iter_adv])
        going = []
        for index, row in enumerate(rows.tolist()):
            if output[index].argmax() != y[row]:
                if control[row] == 0:
                    found[row] = iter_adv[index].detach()
                    continue
                control[row] -= 1
            going.append(index)
        if not going:
            return found
        rows = rows[going]
        eta = step_size * grad[going].sign()
        iter_adv = iter_adv.detach()[going] + eta + noise[step + 1][rows]  # omega times a normal draw
        iter_adv = torch.min(torch.max(iter_adv, x[rows] - eps), x[rows] + eps).clamp(0, 1)
    found[rows] = iter_adv
    return found


def pgd_linf(net: nn.Module, x: Tensor, y: Tensor, noise: Tensor, eps: float, step_size: float, steps: int) -> Tensor:
    """attack_pgd in train_cifar.py of locuslab/robust_overfitting: the backward pass forms weight gradients as well."""
    delta = noise.clamp(0 - x, 1 - x).requires_grad_()
    for _ in range(steps):
        F.cross_entropy(net(x + delta), y).backward()
        grad = delta.grad.detach()  # type: ignore[union-attr]
        moved = torch.clamp(delta.detach() + step_size * torch.sign(grad), min=-eps, max=eps)
        delta.data = moved.clamp(0 - x, 1 - x)
        delta.grad.zero_()  # type: ignore[union-attr]
    return (x + delta).detach()
