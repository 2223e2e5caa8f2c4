"""Reads result files of lm-evaluation-harness and compares the models in them: records, table, plot, report.

The rooms, in the order data flows::

    discover ─► records ─► catalogue ─► comparison ─► table, plot, report
    (which files) (what they say) (re-runs, labels) (metric, axis, who may be compared; choice: frontier, budget)

Nothing here imports torch, an engine or the harness; matplotlib and rich are imported when they draw.
"""
