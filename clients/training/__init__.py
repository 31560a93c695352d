"""Fine-tuning inside a domain: text-based sequential recommendation (MergeRec sec. 2, METHODS).

`fit.fine_tune` trains and writes the task vector, `evaluate.evaluate` ranks, and
`python -m clients.training JOB.json` does both in a process of its own, so that torch's memory is
given back when it ends. Nothing here opens a socket, and no training row reaches a log.
"""
