# Fine-tune the released base weights to answer questions. By default, questions about Python.
#
#   python prepare_data.py --dataset=python_chat            # or your own .jsonl of conversations
#   python train.py config/chat.py
#   python sample.py --out_dir=out/chat --chat
#
# 2 rows x 512 tokens = 1,024 tokens per iteration, of which the assistant's third is learned; 100 iterations =
# 102,400 tokens, a fifth of the dataset. SmolLM2's own recipe is a learning rate of 1e-3 for 128 sequences, 2 epochs,
# cosine, warmup over the first tenth. For 2 sequences instead of 128, the square root of the ratio gives 1e-3 / 8 =
# 1.25e-4; 1e-4 was as good (LOG.md).

out_dir = "out/chat"
init_from = "base"
dataset = "python_chat"

batch_size = 2
block_size = 512
max_iters = 100
learning_rate = 1e-4
min_lr = 0.0
warmup_iters = 10
lr_decay_iters = 100
weight_decay = 0.01

eval_interval = 50
eval_iters = 40
log_interval = 5
sample_interval = 0

compile = True
