"""Language models from nothing: `isthmus language pretrain`, `plan` and the tables of `study`.

No pretrained language model comes with Isthmus. `text` makes prompts of pseudo-users from public catalogs,
`pretrain` trains a small model from scratch on them, `study` compares adapters on it, and `plan` says what
the published sizes need without their weights.
"""
