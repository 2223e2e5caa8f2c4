"""How far a model's next-token distributions are from those of a reference: stored, measured, summed up.

A run with `save_reference=DIR` writes, for each window of a task, what is needed to recover the model's exact
distributions (`store`, `head`, `logits_code`). A run with `reference=DIR`, on any adapter, measures itself against them
(`measure`, `observer`), and the task makes figures of that (`summary`). `session` is the adapters' side of both.

The divergence is D_KL(reference ‖ model) = Σ p (ln p − ln q) in nats, p and q being the softmax of both models' logits
over the tokens that both have (Kullback and Leibler 1951; llama.cpp's tools/perplexity --kl-divergence, ExLlamaV3's
eval/qbench and eval/model_diff use the same direction).
"""
