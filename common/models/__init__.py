"""Backbones: folders in Hugging Face layout that turn text into unit-norm embeddings.

`common.models.base` (folders, digests, tensor names; no torch at import) and `common.models.encoder`
(the model itself) are imported directly, so that a process that only checks files stays small.
"""
