"""The gradient of a vocabulary tile's logits: of the targets' logprobs, and, where the loss uses
them, of entropies and of divergences from a teacher.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class EntropyTerm(NamedTuple):
    """The entropy's part: the entropies, and the factors of their gradients."""

    entropy_A: torch.Tensor
    scale_A: torch.Tensor


class DivergenceTerm(NamedTuple):
    """The divergence's part: the teacher's logits of the tile and its
    log-sum-exps over the whole vocabulary, the divergences, and the factors of their gradients."""

    teacher_AV: torch.Tensor
    teacher_logsumexp_A: torch.Tensor
    divergence_A: torch.Tensor
    scale_A: torch.Tensor


def plain_tile_gradient(
    logits_AV: torch.Tensor,
    first: int,
    targets_A: torch.Tensor,
    logsumexp_A: torch.Tensor,
    scale_A: torch.Tensor,
    temperature: float,
    entropy: EntropyTerm | None = None,
    divergence: DivergenceTerm | None = None,
) -> torch.Tensor:
    """`tile_gradient` in PyTorch operators."""
    logprobs = (logits_AV.float() / temperature).sub_(logsumexp_A[:, None])
    terms = entropy is not None or divergence is not None
    grad = (logprobs.exp() if terms else logprobs.exp_()).neg_()
    index_A = targets_A - first
    inside_A = (index_A >= 0) & (index_A < grad.shape[1])
    index_A = index_A.clamp(0, grad.shape[1] - 1)
    grad.scatter_add_(1, index_A[:, None], inside_A[:, None].to(grad.dtype))
    grad = grad * scale_A[:, None]
    if terms:
        grad = add_gradients(grad, logprobs, temperature, entropy, divergence)
    return grad.to(logits_AV.dtype)


def tile_gradient(
    logits_AV: torch.Tensor,
    first: int,
    targets_A: torch.Tensor,
    logsumexp_A: torch.Tensor,
    scale_A: torch.Tensor,
    temperature: float,
    entropy: EntropyTerm | None = None,
    divergence: DivergenceTerm | None = None,
) -> torch.Tensor:
    """(onehot(target) - softmax) * scale of the tile that starts at `first`, in the logits' dtype,
    plus the gradients of what else is given.

    logsumexp_A: over the whole vocabulary. Consumes the logits: on CUDA they are overwritten.
    """
    arguments = (logits_AV, first, targets_A, logsumexp_A, scale_A, temperature)
    if logits_AV.is_cuda:
        from mesh.model import triton_scores  # needs a GPU driver

        return triton_scores.tile_gradient(*arguments, entropy, divergence)
    return plain_tile_gradient(*arguments, entropy, divergence)


def add_gradients(
    grad_AV: torch.Tensor,
    logprobs_AV: torch.Tensor,
    temperature: float,
    entropy: EntropyTerm | None,
    divergence: DivergenceTerm | None,
) -> torch.Tensor:
    """A tile's gradient with those of entropy and divergence through the policy's logits over the
    temperature, fp32: -p * (log p + entropy) and p * (log p - log q - divergence).

    Both are exactly 0 where p is.
    """
    if entropy is not None:
        surplus_AV = logprobs_AV + entropy.entropy_A[:, None]
        grad_AV = grad_AV - logprobs_AV.exp() * surplus_AV * entropy.scale_A[:, None]
    if divergence is not None:
        u_AV = divergence.teacher_AV.float() / temperature
        surplus_AV = logprobs_AV - (u_AV - divergence.teacher_logsumexp_A[:, None])
        surplus_AV = surplus_AV - divergence.divergence_A[:, None]
        grad_AV = grad_AV + logprobs_AV.exp() * surplus_AV * divergence.scale_A[:, None]
    return grad_AV
