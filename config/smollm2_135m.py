# The published recipe of SmolLM2-135M's first stage, with a context of 2,048 tokens, for many GPUs:
#
#   torchrun --nnodes=8 --nproc_per_node=8 train.py config/smollm2_135m.py --dataset=...
#
# (source: pretraining/smollm2/config_smollm2_135M.yaml in huggingface/smollm)
#
# 8 sequences x 64 processes x 2,048 tokens = 1,048,576 tokens per iteration. gradient_accumulation_steps
# counts all processes together, so the batch is the same on 64 GPUs (one pass each) as on 8 (eight passes each).
# 2,000,000 iterations = 2.1 T tokens.

out_dir = "out/smollm2_135m"
dataset = "smollm2-corpus"

rope_theta = 10_000.0  # in this stage; the release continues it with 8,192 tokens and theta 100,000
max_position_embeddings = 2048

batch_size = 8
gradient_accumulation_steps = 64
block_size = 2048

max_iters = 2_000_000
learning_rate = 3e-3
min_lr = 0.0
schedule = "wsd"  # warmup, stable, then linear decay to zero over the last 400,000
warmup_iters = 2000
lr_decay_iters = 2_000_000
wsd_decay_iters = 400_000
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
