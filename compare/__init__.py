"""Reads result files of lm-evaluation-harness and compares the models in them.

The rooms, in the order data flows (an import-linter contract)::

    results ──► comparison ──► table, plot ──► report          run              commands
    files to    records to     judgement to                    starts missing   argparse; calls
    records     judgement      what is shown                   evaluations      the other rooms

``results`` reads files into `Record`; ``comparison`` decides which results are comparable, which are best, and which
differ by more than chance; ``table``, ``plot`` and ``report`` show that. ``run`` plans and starts the evaluations of a
spec. ``commands`` alone knows argparse: the rooms below it take typed options. Shared leaf modules: ``metrics`` (one
row per metric), ``families`` (one row per quantization family), ``text``, ``errors``, ``files``, ``console``,
``division``; ``write`` draws a plot for ``compare plot`` and ``compare run``.

Nothing here imports torch, an engine or the harness; matplotlib and rich are imported only when something is drawn.
"""
