"""Optimizers as users write them."""

from __future__ import annotations

from typing import Any

import torch


class SignMomentum(torch.optim.Optimizer):
    """The sign of a momentum in bfloat16, with a rate that its own count of steps lowers, and a
    factor of each row that follows the row's largest gradient."""

    def __init__(
        self, params: Any, lr: float, beta: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay, "taken": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["taken"] += 1
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight, dtype=torch.bfloat16)
                    state["seen"] = 0
                    state["largest"] = (
                        torch.zeros_like(weight[..., :1]) if weight.dim() > 1 else None
                    )
                    state["count"] = torch.zeros((), dtype=torch.int64)
                state["seen"] += 1
                state["count"] += 2
                momentum = state["momentum"]
                momentum.mul_(group["beta"]).add_(weight.grad.to(torch.bfloat16))
                rate = group["lr"] / group["taken"] / (1 + float(state["count"]) / state["seen"])
                update = momentum.float().sign()
                if weight.dim() > 1:
                    update = update / (1 + self.follow(state, weight.grad))
                weight.mul_(1 - rate * group["weight_decay"]).add_(update, alpha=-rate)

    def follow(self, state: dict[str, Any], gradient: torch.Tensor) -> torch.Tensor:
        """The largest gradient of a row so far, also of one that lies on several ranks."""
        state["largest"] = torch.maximum(state["largest"], gradient.abs().amax(-1, keepdim=True))
        return state["largest"]


class Hidden(SignMomentum):
    """Keeps what it depends on where no checkpoint looks."""

    taken = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.taken += 1
        for group in self.param_groups:
            group["lr"] /= self.taken
        super().step()


class Random(SignMomentum):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["lr"] *= float(torch.rand(()))
        super().step()


class Late(torch.optim.SGD):
    """Has a state that begins in the second step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for weight in (w for group in self.param_groups for w in group["params"]):
            state = self.state[weight]
            if "taken" in state:
                state["late"] = torch.zeros_like(weight)
            state["taken"] = 1
        super().step()


class Listed(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for weight in (w for group in self.param_groups for w in group["params"]):
            self.state[weight]["history"] = [1.0]


class Still(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        pass


class Partial(torch.optim.SGD):
    """On shards its state is a sum that is still to be taken."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for weight in (w for group in self.param_groups for w in group["params"]):
            self.state[weight]["total"] = weight.grad.sum()


class NoRate(torch.optim.Optimizer):
    def __init__(self, params: Any, depth: int) -> None:
        super().__init__(params, {"depth": depth})
