"""Training data: from a JSONL row to token ids and labels.

    readers         files, folders, data sets of the Hub -> rows
    schemas         a row's keys -> a sample: chat messages, prompt and completion, or text
    chat_template   messages -> text, as the model's chat template writes it
    loss_mask       a sample -> its text, and which tokens of it are trained
    tokenize        text and loss mask -> token ids and labels
    dataset         examples in flat arrays, the split, the report
    collate         examples -> batches of tensors

prepare.py puts these steps together; demo.py makes the model and data of `tailora demo`.
"""
