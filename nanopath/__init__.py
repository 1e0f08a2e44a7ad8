"""What the stages stand on. A first reading of nanopath never opens this folder.

    devices parallel checkpoint run plan   a machine and its ranks, layouts over many, state to resume from, a run, its cost
    hf hub files flags                     Hugging Face folders, downloads, files that are never half written, the command line
    kernels                                faster ways to the same numbers, each with its plain twin in a stage
    constrain grammar terminal             masks for structured output, and its grammar; the screen and the chat of sample.py

Nothing here imports a stage; the tokenizer (bpe) is the exception, for its hash and its bytes.
"""
