# SmolLM2-360M's published recipe for its first stage, with 2,048 tokens of context, for many GPUs. docs/scale.md has
# the commands. Beside config/smollm2_135m.py, the network, the batch and the number of iterations differ.
#
# (source: text/pretraining/smollm2/config_smollm2_360M.yaml in huggingface/smollm)
#
# 6 sequences x 128 processes x 2,048 tokens = 1,572,864 tokens an iteration; 2,600,000 iterations = 4.1 T tokens.

out_dir = "out/smollm2_360m"
dataset = "smollm2-corpus"

hidden_size = 960
intermediate_size = 2560
num_hidden_layers = 32
num_attention_heads = 15
num_key_value_heads = 5
rope_theta = 10_000.0  # of this stage; the release continues it with 8,192 tokens and theta 100,000
max_position_embeddings = 2048
initializer_range = 0.03227  # 1 / sqrt(960)

batch_size = 6
gradient_accumulation_steps = 128
block_size = 2048

max_iters = 2_600_000
learning_rate = 3e-3
min_lr = 0.0
schedule = "wsd"  # warmup, stable, then linear decay to zero over the last 520,000
warmup_iters = 2000
lr_decay_iters = 2_600_000
wsd_decay_iters = 520_000
weight_decay = 0.01
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

seed = 8
dtype = "bfloat16"
compile = True
eval_interval = 2000
eval_iters = 20
log_interval = 1
