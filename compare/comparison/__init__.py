"""Records to judgement: which results are comparable, which is best, which differ by more than chance.

attribution    Which parts of a quantized model cost the most: ``compare attribute``
axis           The quantities of the x axis: bits per weight, or the size of a model
best           Which models are worth a look: the Pareto frontier, and the best model that fits a memory budget
broken         Models with a figure that is NaN or infinite: marked in every comparison
build          Records to comparisons: one metric, one axis, and which results may be compared
by_position    A metric by the position in the window: a point's curve, its 95 % intervals, and the slope per
               doubling
choice         Which quantization to run: the answer of ``compare choose``, in sentences with their figures
chosen_metric  Which figures to compare: ``--metric TASK/METRIC`` or ``METRIC``, or the perplexity of the only
               task that has one
comparison     `Comparison`: one metric, one axis, the points, and the judgements that follow from them
equivalence    Whether two models differ by less than a margin: two one-sided tests, and how many units a decision
               needs
flips          Which answers change between two models: right to wrong, wrong to right, and from one answer to another
labels         The model that a label on the command line names: ``--versus LABEL``, ``--baseline LABEL``
domains        One metric over several domains: the losses of each, and whether they order the models alike
load           Paths to comparisons: reads results, builds comparisons, reports what was left out
loss           How much a model loses against the original, in nats, per cent or points
margins        Margins of equivalence: ``--margin 1``, ``--margin perplexity=1%``, ``--margin kld=0.01``
mean           The mean of several tasks: which tasks count, the figure and its error, one record per model
memory         The memory that a model needs, and whether it fits: all weights, embeddings included, and the KV
               cache of a context
model_sizes    Whether two results are from the same model, judged by its number of weights and architecture
noise_floor    The noise floor of a metric that needs a reference: how far full precision is from the reference
paired_samples The samples of two runs, checked and matched: the same windows, or the documents that both answered
pairs          Every model of a comparison against a baseline, paired by window or document: ``compare table
               --versus LABEL``
point          `Point`: one record on the chosen metric and axis; what must be said beside points
reruns         One record per model and task: the latest re-run counts, and labels become unique
significance   Whether the difference between two models is more than chance, from pairs of the same windows or
               questions
task_hashes    Hashes of the scored prompts, which a result file has only with --log_samples
versus         Pairs in every comparison of a command, as --versus and --margin ask
"""
