"""Perplexity tasks: text to token windows to metrics.

A task is one YAML file here, which names a protocol and a text, and the one Task class that they share. Files, in the
order in which data flows:

    settings     the settings of a task, from the harness' metadata
    data_sets    the short names of `dataset=`: one row of `DATA_SETS` per name
    corpus       rows of text from a raw file, a parquet file or the hub, joined as a protocol requires
    tokenizers   which tokenizer the text is tokenized with
    protocols    how a token sequence is cut into windows: one row of `PROTOCOLS` per protocol
    perplexity   the Task class: requests to the model, metrics, and the record of what was scored

To add a task: one YAML file. To add a protocol: one function and one row in `protocols`, and a YAML file that names it.
To add a data set: one row in `data_sets`. What a task asks of a model, and what it gets back, is defined in
`lmeval_ext.requests`.
"""
