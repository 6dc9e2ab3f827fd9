"""
Build the optimizer (AdamW, or Muon and AdamW) and the learning-rate schedule, and load their saved state.

    optimizer, scheduler = build_optimizer(model, config)           # at iteration 0
    load_run(checkpoint, model, optimizer, scheduler, config)       # at the checkpoint's iteration
"""

import math

import torch

from lib.errors import usable
from lib.processes import reshard


def get_lr(config, iter_num):
    """Return the learning rate of the update that follows iter_num updates: a pure function of the iteration."""
    if iter_num < config.warmup_iters:
        return config.learning_rate * (iter_num + 1) / config.warmup_iters
    if config.schedule == "cosine":
        length = config.lr_decay_iters - config.warmup_iters
        progress = (iter_num - config.warmup_iters) / max(1, length)
        factor = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        left = (config.lr_decay_iters - iter_num) / max(1, config.wsd_decay_iters)
        factor = min(1.0, max(0.0, left))
    min_lr = config.learning_rate / 10 if config.min_lr is None else config.min_lr
    return min_lr + factor * (config.learning_rate - min_lr)


class AdamWAndMuon(torch.optim.Optimizer):
    """Two optimizers as one, with one state dict, because each has its own parameters."""

    def __init__(self, adamw, muon):
        super().__init__(adamw.param_groups + muon.param_groups, defaults={})
        self.parts = (adamw, muon)
        self.share_state()

    def share_state(self):
        """Let the parts hold the same groups and the same state, not copies."""
        adamw, muon = self.parts
        n = len(adamw.param_groups)
        adamw.param_groups, muon.param_groups = self.param_groups[:n], self.param_groups[n:]
        adamw.state = muon.state = self.state

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.share_state()

    def step(self, closure=None):
        for part in self.parts:
            part.step()


def build_optimizer(model, config):
    """Return (optimizer, scheduler) at iteration 0. Only matrices decay, not the weights of the norms."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() != 2]
    hidden = matrices[1:] if config.optimizer == "muon" else []  # the first is the embedding
    groups = [dict(params=matrices[: len(matrices) - len(hidden)]), dict(params=norms, weight_decay=0.0)]
    # lr=1.0 here, because the scheduler multiplies it by get_lr
    betas, decay = (config.beta1, config.beta2), config.weight_decay
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=1e-8, weight_decay=decay, fused=True)
    if hidden:
        factor = 1.0 if config.muon_learning_rate is None else config.muon_learning_rate / config.learning_rate
        muon = torch.optim.Muon(hidden, factor, decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        optimizer = AdamWAndMuon(optimizer, muon)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda iter_num: get_lr(config, iter_num))


def load_run(checkpoint, model, optimizer, scheduler, config):
    """Load a checkpoint's weights, moments and iteration. The settings of optimizer and scheduler stay as in config."""
    settings = [{name: v for name, v in group.items() if name != "params"} for group in optimizer.param_groups]
    base_lrs = scheduler.base_lrs  # a factor of get_lr for each group
    with usable(f"{config.out_dir}/ckpt.pt", "take an earlier copy, or train again"):
        checkpoint = reshard(checkpoint, model, optimizer)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"] | dict(base_lrs=base_lrs))
        for group, values, base_lr in zip(optimizer.param_groups, settings, base_lrs, strict=True):
            group |= values | dict(lr=base_lr * get_lr(config, checkpoint["iter_num"]))
        # torch does not check this, and the fused AdamW would write beyond the end of a tensor that is too small
        if len(optimizer.state) != sum(len(group["params"]) for group in optimizer.param_groups):
            raise ValueError("its optimizer lacks the moments of some tensors")
        for p, state in optimizer.state.items():
            for name, value in state.items():
                if value.shape != (() if name == "step" else p.shape):
                    raise ValueError(
                        f"its optimizer has {name} of shape {list(value.shape)} for one of {list(p.shape)}"
                    )
