"""
The optimizer and its learning rate: AdamW on everything, or Muon on the blocks' matrices and AdamW on the rest.

    optimizer, scheduler = build_optimizer(model, config)
    load_optimizer(optimizer, scheduler, checkpoint, config)
    lr = get_lr(config, iter_num)

To change the schedule, change get_lr. To add an optimizer, build it in build_optimizer.
"""

import math

import torch


def get_lr(config, iter_num):
    """Learning rate of the update that follows iter_num updates: a pure function, so a resume needs no state."""
    if iter_num < config.warmup_iters:
        return config.learning_rate * (iter_num + 1) / config.warmup_iters
    if config.schedule == "cosine":
        length = config.lr_decay_iters - config.warmup_iters
        done = (iter_num - config.warmup_iters) / max(1, length)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    else:
        left = (config.lr_decay_iters - iter_num) / max(1, config.wsd_decay_iters)
        share = min(1.0, max(0.0, left))
    min_lr = config.learning_rate / 10 if config.min_lr is None else config.min_lr
    return min_lr + share * (config.learning_rate - min_lr)


def build_optimizer(model, config):
    """(optimizer, scheduler) at iteration 0. Weight decay pulls on matrices, not on the norms' weights."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() != 2]
    hidden = matrices[1:] if config.optimizer == "muon" else []  # the first is the embedding
    # lr=1.0 here, because the scheduler multiplies it by get_lr
    adamw = torch.optim.AdamW(
        [dict(params=matrices[: len(matrices) - len(hidden)]), dict(params=norms)], lr=1.0, eps=1e-8, fused=True
    )
    optimizer = adamw
    if hidden:
        lr = 1.0 if config.muon_learning_rate is None else config.muon_learning_rate / config.learning_rate
        optimizer = Together(adamw, torch.optim.Muon(hidden, lr=lr, momentum=0.95, adjust_lr_fn="match_rms_adamw"))
    use_settings(optimizer, config)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda iter_num: get_lr(config, iter_num))


def use_settings(optimizer, config):
    """Put weight_decay and betas into the groups: matrices, norms and, with Muon, the blocks' matrices."""
    for group, decay in zip(optimizer.param_groups, (config.weight_decay, 0.0, config.weight_decay), strict=False):
        group["weight_decay"] = decay
        if "betas" in group:
            group["betas"] = (config.beta1, config.beta2)


def load_optimizer(optimizer, scheduler, checkpoint, config):
    """Put a checkpoint's state into optimizer and scheduler."""
    factors = scheduler.base_lrs  # of get_lr, one per group, by today's settings
    optimizer.load_state_dict(checkpoint["optimizer"])
    scheduler.load_state_dict(checkpoint["scheduler"] | dict(base_lrs=factors))
    use_settings(optimizer, config)  # it brought its saved ones along; those given by flag or config file win
    for group, factor in zip(optimizer.param_groups, factors, strict=True):
        group["initial_lr"] = factor
        group["lr"] = factor * get_lr(config, checkpoint["iter_num"])


class Together(torch.optim.Optimizer):
    """Two optimizers as one, with one state dict, because each has parameters of its own."""

    def __init__(self, first, second):
        super().__init__(first.param_groups + second.param_groups, defaults={})
        self.parts = (first, second)
        self.share()

    def share(self):
        """Let the parts hold the same groups and the same state, not copies."""
        first, second = self.parts
        n = len(first.param_groups)
        first.param_groups, second.param_groups = self.param_groups[:n], self.param_groups[n:]
        first.state = second.state = self.state

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.share()

    def step(self, closure=None):
        for part in self.parts:
            part.step()
