"""Training data: from a JSONL row to token ids and labels.

    readers         files, folders, datasets on the Hub -> rows
    samples         what rows become: a conversation, a prompt with its completion, a text, ...
    schemas         a row's keys -> a sample
    chat_template   messages -> text, with the model's chat template
    loss_mask       a sample -> its text, and which tokens are trained
    tokenize        text and loss mask -> token ids and labels
    collate         examples -> tensors of a batch, packed or padded
    dataset         a single example, all examples in flat arrays, the split, the report
    labels          names of classes and tags, for classification models

`ChatTokenizer` in chat_template.py carries the tokenizer and the settings through all steps, and prepare.py combines
them. demo.py has the model and data of `tailora demo`.
"""
