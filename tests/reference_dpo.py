"""Equation 2 of Step-DPO (arXiv 2406.18629) in plain torch, independent of TRL and this package."""

import torch


def step_log_prob(model, prefix, step):
    """Return log pi(step | prefix) of one unpadded sequence, summed token by token."""
    logits = model(torch.tensor([prefix + step])).logits[0]
    total = torch.zeros(())
    for offset, token in enumerate(step):
        # the logits at position t - 1 predict the token at position t
        total = total + torch.log_softmax(logits[len(prefix) + offset - 1], dim=-1)[token]
    return total


def step_dpo_loss(policy, reference, pairs, beta):
    """Return the mean of -log sigmoid(beta * (win log-ratio - lose log-ratio)) over (prefix, win, lose) token ids."""
    losses = []
    for prefix, win, lose in pairs:
        with torch.no_grad():
            ref_win, ref_lose = step_log_prob(reference, prefix, win), step_log_prob(reference, prefix, lose)
        win_ratio = step_log_prob(policy, prefix, win) - ref_win
        lose_ratio = step_log_prob(policy, prefix, lose) - ref_lose
        losses.append(torch.log1p(torch.exp(-beta * (win_ratio - lose_ratio))))
    return torch.stack(losses).mean()
