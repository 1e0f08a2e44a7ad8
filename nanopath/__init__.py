"""What the stages stand on. A first reading of nanopath never opens this folder.

    start devices parallel        what is settled before torch loads; the machine; a model on many processes
    run checkpoint plan           a run: its folder, its log, what can go wrong; its state on disk; what it needs
    flags files hub               the command line; files that are never half written; downloads
    hf families known gguf        Hugging Face folders; how each family is spelt there; well-known models; llama.cpp's
    kernels rope                  faster ways to the same numbers, each with its plain twin in a stage
    constrain grammar terminal    masks for structured output, and its grammar; the screen and the chat of sample.py
    scores texts judge untrusted  tables and intervals of evaluate.py; texts in files; who judges; programs of a model

Nothing here imports a stage; the tokenizer (bpe) is the exception, for its hash and its bytes.
"""
