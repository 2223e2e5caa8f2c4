"""Result files to records.

attribution            Reads the file of ``compare attribute``: what each part of a quantized model costs
arithmetic             Whether a result was computed weight-only or with quantized activations, from scheme,
                       kernel and notes
chosen_answer          The answer that a model chose, from a line of the harness' samples
discover               Which files to read: the files given, and every result file of the harness below the folders
                       given
divergence             Reads ``configs.TASK.metadata.divergence``: how far a model is from a stored reference
groups                 Groups of the harness, such as mmlu: values that a result file has only for their subtasks
inferred_quantization  What the result file of a stock model (the harness' own) tells of its weights: never how they
                       are stored
label_index            How results of `compare run` are shown: labels and figures from the spec, kept beside the
                       results, not in them
positions              Reads ``configs.TASK.metadata.by_position``: figures by the position in the window, and
                       their slope over it
provenance             How a result was produced: the run as its file records it, and the harness command that
                       repeats it
reading                Reads a result file into records. The file is not trusted; errors name what does not fit
records                The content of harness result files, one `Record` per task: plain data, standard library
                       only
samples                Reads what the harness logs per document (--log_samples), as far as a paired comparison
                       needs it
settings               The settings of a harness task that decide its figure, from the files of lm-eval 0.3 to 0.4.13
values                 Values of an untrusted JSON file: each as the expected type, or empty or None where it has
                       another type
"""
