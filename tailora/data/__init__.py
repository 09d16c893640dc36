"""Training data: from a JSONL row to token ids and labels.

    readers         files, folders, data sets of the Hub -> rows
    schemas         a row's keys -> a sample: chat messages, prompt and completion, or text
    chat_template   messages -> text, as the model's chat template writes it
    loss_mask       a sample -> its text, and which tokens of it are trained
    tokenize        text and loss mask -> token ids and labels
    collate         examples -> tensors of a batch, packed or padded
    dataset         an example, all of them in flat arrays, the split, the report
    labels          names of classes and tags, for models with a head for labels

`ChatTokenizer` in chat_template.py brings the tokenizer and the settings of all steps, and prepare.py puts the steps
together. demo.py makes the model and data of `tailora demo`.
"""
