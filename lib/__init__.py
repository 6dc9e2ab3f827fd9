"""
What the scripts share, a room a subject. Rooms import no script, only each other, model.py and libraries.

    dataset      data/<name>/: its files of ids as arrays; datatrove's files of ids
    shards       what an interrupted preparation goes on from
    parts        the shares of a corpus that many machines prepare, and their merge
    batches      an array of token ids -> blocks of them, in a computed order; a mean with its standard error
    tokenizer    tokenizer.json -> tiktoken.Encoding; text <-> ids
    chat         the Instruct releases' chat template
    conversations  rows with questions and answers -> messages -> ids and masks, packed
    python_chat  the standard library's docstrings -> conversations
    machine      device, dtype, matmul precision, memory, torch.compile
    processes    one process or torchrun's, and the signals that stop them
    parallel     several processes, one network: data parallel or sharded
    optimizer    AdamW, Muon and the learning-rate schedule
    checkpoint   ckpt.pt, its keys and versions
    log          log.csv, loss.png, the closing summary
    pictures     a picture that reads on a light and on a dark page
    trackers     log.csv's rows to trackio, wandb or tensorboard
    files        files written whole, folders with one writer, sha256
    errors       one line in place of a traceback
    folders      a folder or glob -> the files to read, and what is left out
    readers      people's files (text, rows of many formats, Hub datasets) -> documents
    tasks        rows of multiple choice, a file's or the Hub's -> items
    decoding     a file's bytes -> text: compression, encodings, binaries named
    official     a release's name -> its files on this machine, hashes checked
    weights      any weights -> model.SmolLM2; config.json in and out
    gguf         .gguf files -> config, tensors, tokenizer.json
    formats      what a file or a folder of weights is, by its content
    layouts      the same weights in another order of rows or heads
"""
