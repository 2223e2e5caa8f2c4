"""``compare run``: from specs of models and data to result files, each model in a process of its own.

The rooms, in the order data flows::

    loading ─► schema ─► jobs ─► planning ─► pool ─► harness ─► store ─► presentations
    (files)   (what may (what is (what is    (who runs (one     (publish) (labels for
              stand in)  to run)  missing)    when)     process)           compare's readers)

`engines` says what each `load_fn` of ExLlamaV3's compare_q stands for; `fingerprint` what makes two checkpoints the
same; `divergence` who writes a reference and who is measured against it, `references` what is known of its folder;
`tasks` what waits for what; `hints` what a failure's log means. `ray_pool` is `pool` on a Ray cluster.
"""
