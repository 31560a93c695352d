"""Evo-Merging: a hundred LoRA adapters merged by evolution, from losses alone (Chen et al., 2025; METHODS).

`evolve.evolve` is the method: CMA-ES over sparsity ratios, then over signed scales.
`fitness` holds what may say how good a candidate is: the server's own scoring of labelled prompts, the
domains (one rounded number a candidate), or the agreement with the adapters' own models on prompts without
labels. `compare` puts the method beside others on the same adapters and samples.
"""
