"""Check the range of every number, whether it comes from a flag, a config file, a checkpoint or a config.json."""

LIMITS = {  # setting: (smallest, largest); whole numbers if these are
    # the model
    "vocab_size": (1, 2**24), "hidden_size": (1, 2**20), "intermediate_size": (1, 2**20),
    "num_hidden_layers": (1, 1_000), "num_attention_heads": (1, 1_000), "num_key_value_heads": (1, 1_000),
    "head_dim": (2, 2**16), "max_position_embeddings": (1, 2**20), "rope_theta": (1.0, 1e12),
    "rms_norm_eps": (0.0, 1.0), "initializer_range": (0.0, 100.0),
    # train.py
    "batch_size": (1, 2**24), "block_size": (1, 2**24), "gradient_accumulation_steps": (1, 2**24),
    "max_iters": (1, 10**12), "learning_rate": (0.0, 100.0), "muon_learning_rate": (0.0, 100.0),
    "weight_decay": (0.0, 100.0), "beta1": (0.0, 0.999999), "beta2": (0.0, 0.999999), "grad_clip": (0.0, 1e9),
    "warmup_iters": (0, 10**12), "lr_decay_iters": (0, 10**12), "wsd_decay_iters": (0, 10**12),
    "log_interval": (1, 10**12), "eval_interval": (1, 10**12), "eval_iters": (1, 10**9),
    "sample_interval": (0, 10**12), "seed": (0, 2**63 - 1),
    # sample.py
    "num_samples": (1, 2**20), "max_new_tokens": (1, 2**31), "temperature": (0.0, 100.0), "top_k": (-1, 2**31),
    "top_p": (0.0, 1.0), "repetition_penalty": (0.01, 100.0),
    # the other scripts
    "val_fraction": (1e-9, 1 - 1e-9), "max_documents": (1, 10**15), "window": (1, 2**20), "stride": (1, 2**20),
    "limit": (1, 2**62), "repeats": (1, 1_000), "iters": (1, 10**9),
}  # fmt: skip


def check_limits(settings):
    """Raise ValueError if a number in {name: value} is out of its range. None is a default, and passes."""
    for name, value in settings.items():
        if name in LIMITS and value is not None:
            low, high = LIMITS[name]
            numbers, kind = ((int,), "a whole number") if type(low) is int else ((int, float), "a number")
            if type(value) not in numbers or not low <= value <= high:  # NaN is in no range
                raise ValueError(f"{name} is {value!r}: it must be {kind} from {low:,.15g} to {high:,.15g}")
