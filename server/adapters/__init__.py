"""Merging of PEFT LoRA adapters as adapters: folders in, one folder out. numpy only; no torch, no peft.

An adapter gives each adapted layer the update `W_i = s_i B_i A_i` (`B` [R, K], `A` [K, C], scaling
`s = lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`). Conventions here:

- what merges is the update, scaling included; the result's own scaling is 1 (`lora_alpha = r`);
- weights multiply updates (`product`, `knots`) or factors (`factors`, `elementwise`: not the same thing);
- ranks may differ between adapters and between layers where the rule allows it;
- no R x C matrix is ever formed: norms, residuals and truncations come from QR of the factors and an SVD of
  a core as small as the ranks' sum; computed in float64, written in float32;
- thresholds of inner methods (TIES) count over the whole adapter, PEFT's over each tensor.

`merge_adapters` is the way in, `adapter_methods()` says what there is, `is_adapter(folder)` what a folder is.
"""

from __future__ import annotations

from server.adapters.merge import merge_adapters
from server.adapters.rules import AdapterMethod, adapter_methods
from server.folders import is_adapter

__all__ = ["AdapterMethod", "adapter_methods", "is_adapter", "merge_adapters"]
