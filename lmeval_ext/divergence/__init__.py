"""How far a model's next-token distributions are from those of a reference: stored, measured, summarized.

A run with `save_reference=DIR` writes, for each window of a task, what recovers the model's exact distributions. A run
with `reference=DIR`, on any adapter, measures itself against them, and the task forms its figures from that.

The divergence is D_KL(reference ‖ model) = Σ p (ln p − ln q) in nats, p and q being the softmax of both models' logits
over the tokens that both have (Kullback and Leibler 1951; llama.cpp's tools/perplexity --kl-divergence, ExLlamaV3's
eval/qbench and eval/model_diff use the same direction).

    what a run does       session          scores windows with save_reference= or reference=; start here
                          arguments        the model arguments that turn it on
                          measured_model   what `session` needs of a model (Protocol)
                          fit              whether a reference fits a model: tokenizer, vocabulary, windows
                          weights          identity of a checkpoint's weights
    while logits exist    plan             what to observe, in plain types, for engines in other processes
                          observer         one observer measures against a store, another fills one
                          measure          D_KL per token; measure_triton: the same as one GPU kernel
                          head             output matrix: from hidden states to logits
                          dense_head       output matrix from an unquantized checkpoint's files
                          logits_code      rows of logits in two bytes per token
    on disk               store            folder of a reference and its parts
                          store_files      files with checksums
                          read_ahead       reads windows before the engine needs them
    figures               summary          means, quantiles, buckets, errors
"""
