# Fine-tune the released base weights on your own text. By default, on the source and manual of Python.
#
#   python prepare_data.py --dataset=my/notes.txt
#   python train.py config/finetune.py --dataset=notes
#
# 4 sequences x 256 tokens = 1,024 tokens per iteration; 100 iterations = 102,400 tokens, a thirtieth of the dataset.
# The learning rate is a thirtieth of the 3e-3 of pretraining, because the gradient of 1,024 tokens is about thirty
# times as noisy as that of the million tokens per batch there (the square root of 1,000).

out_dir = "out/finetune"
init_from = "base"
dataset = "python"

batch_size = 4
block_size = 256
max_iters = 100
learning_rate = 1e-4
min_lr = 0.0
warmup_iters = 10
lr_decay_iters = 100
weight_decay = 0.01

eval_interval = 50
eval_iters = 20
log_interval = 5
sample_interval = 50
sample_prompt = "def"

compile = True
