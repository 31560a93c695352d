"""Causal language models that rank: records, prompts, scoring, adapters. What both shores need of them.

torch, transformers and peft are imported by `model` and `scoring` alone, so that a process that only
reads records, templates or adapters' headers stays small.
"""
