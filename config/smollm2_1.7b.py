# SmolLM2-1.7B's published recipe for its first stage, with 2,048 tokens of context, for many GPUs. docs/scale.md has
# the commands. Beside config/smollm2_135m.py, the network, the batch, the learning rate and the iterations differ.
#
# (source: text/pretraining/smollm2/config_smollm2_1B.yaml in huggingface/smollm)
#
# 4 sequences x 256 processes x 2,048 tokens = 2,097,152 tokens an iteration; 5,240,000 iterations = 11 T tokens.

out_dir = "out/smollm2_1.7b"
dataset = "smollm2-corpus"

hidden_size = 2048
intermediate_size = 8192
num_hidden_layers = 24
num_attention_heads = 32
num_key_value_heads = 32
rope_theta = 10_000.0  # of this stage; the release continues it with 8,192 tokens and theta 130,000
max_position_embeddings = 2048
initializer_range = 0.02

batch_size = 4
gradient_accumulation_steps = 256
block_size = 2048

max_iters = 5_240_000
learning_rate = 5e-4
min_lr = 0.0
schedule = "wsd"  # warmup, stable, then linear decay to zero over the last 524,000
warmup_iters = 2000
lr_decay_iters = 5_240_000
wsd_decay_iters = 524_000
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
