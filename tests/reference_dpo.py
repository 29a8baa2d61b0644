"""Equation 2 of Step-DPO (arXiv 2406.18629) in plain torch, independent of TRL and this package."""

import torch


def step_log_prob(model, prefix, step, images=None):
    """Return log pi(step | prefix) of one unpadded sequence, summed token by token."""
    images = images or {}
    of_tokens = {name for name, value in images.items() if value.shape == (1, len(prefix))}  # e.g. token types
    images = {k: torch.nn.functional.pad(v, (0, len(step))) if k in of_tokens else v for k, v in images.items()}
    logits = model(torch.tensor([prefix + step]), **images).logits[0]
    total = torch.zeros(())
    for offset, token in enumerate(step):
        # the logits at position t - 1 predict the token at position t
        total = total + torch.log_softmax(logits[len(prefix) + offset - 1], dim=-1)[token]
    return total


def step_dpo_loss(policy, reference, pairs, beta):
    """
    Return the mean of -log sigmoid(beta * (win log-ratio - lose log-ratio)) over pairs.

    A pair is (prefix, win, lose) token ids, followed by the image inputs of the model if the prefix has images.
    """
    losses = []
    for prefix, win, lose, *images in pairs:
        images = images[0] if images else {}
        with torch.no_grad():
            ref_win = step_log_prob(reference, prefix, win, images)
            ref_lose = step_log_prob(reference, prefix, lose, images)
        win_ratio = step_log_prob(policy, prefix, win, images) - ref_win
        lose_ratio = step_log_prob(policy, prefix, lose, images) - ref_lose
        losses.append(torch.log1p(torch.exp(-beta * (win_ratio - lose_ratio))))
    return torch.stack(losses).mean()
