"""Divergences from a teacher's next-token distribution, all of it or its likeliest tokens; pure functions of logits.

Hinton, Vinyals and Dean (arXiv 1503.02531): teacher p and student q are the softmax of logits / temperature, and
KL(p || q) is multiplied by temperature², so that its gradients keep their size.

Top-k: the teacher's distribution over V tokens is coarsened to k + 1 events, its k likeliest tokens and "any other":

    KL_k = sum over top k of p_i (log p_i - log q_i) + p_r (log p_r - log q_r),  p_r = 1 - sum p_i, q_r = 1 - sum q_i

By the log-sum inequality (Cover and Thomas, Elements of Information Theory, theorem 2.7.1) this is at most KL, and it
is zero only where student and teacher agree on all k + 1 events; with k = V it is KL. The mass of the others keeps the
student from learning a distribution that is too sharp, as it would from the k tokens alone. Both remaining masses are
summed over the other tokens in log space, because 1 - sum loses all digits where the sum is near 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Below this a log-probability stands for zero; e to it is the smallest number that float32 holds.
LOWEST = -100.0


@dataclass(frozen=True)
class TopK:
    """A teacher's coarsened distribution at some positions.

    Attributes:
        ids: int64 [positions, k], its likeliest tokens.
        logprobs: float32 [positions, k], theirs.
        rest: float32 [positions], log of the mass of all other tokens; -100 where there are none.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor
    rest: torch.Tensor

    def __getitem__(self, part: slice) -> TopK:
        return TopK(self.ids[part], self.logprobs[part], self.rest[part])


def top_k(logits: torch.Tensor, k: int, temperature: float) -> TopK:
    """Coarsens a teacher's distribution.

    Args:
        logits: [positions, vocabulary].
        k: tokens kept; at most the vocabulary is.
        temperature: the logits are divided by it.
    """
    scaled = logits.float() / temperature
    total = scaled.logsumexp(-1)
    values, ids = scaled.topk(min(k, scaled.shape[-1]), dim=-1)
    return TopK(ids, values - total[:, None], _rest(scaled, ids, total))


def _rest(scaled: torch.Tensor, ids: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Log of the mass of all tokens but those of `ids`; `LOWEST` where it is nothing."""
    if ids.shape[-1] >= scaled.shape[-1]:
        return torch.full_like(total, LOWEST)
    return (scaled.scatter(-1, ids, -torch.inf).logsumexp(-1) - total).clamp(min=LOWEST)


def sparse_divergence(logits: torch.Tensor, teacher: TopK, temperature: float) -> torch.Tensor:
    """temperature² · KL_k at each position.

    Args:
        logits: the student's, [positions, vocabulary].
        teacher: result of `top_k` at the same temperature.

    Returns:
        float32 [positions].
    """
    scaled = logits.float() / temperature
    total = scaled.logsumexp(-1)
    picked = scaled.gather(-1, teacher.ids) - total[:, None]
    rest = _rest(scaled, teacher.ids, total)
    kept = (teacher.logprobs.exp() * (teacher.logprobs - picked)).sum(-1)
    return temperature**2 * (kept + teacher.rest.exp() * (teacher.rest - rest))


def dense_divergence(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """temperature² · KL(teacher || student), float32 [positions], of two logits [positions, vocabulary]."""
    ours = (logits.float() / temperature).log_softmax(-1)
    theirs = (teacher_logits.float() / temperature).log_softmax(-1)
    return temperature**2 * (theirs.exp() * (theirs - ours)).sum(-1)
