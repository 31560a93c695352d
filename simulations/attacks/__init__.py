"""What a task vector gives away, and what a poisoned one does: `isthmus attacks CONFIG --out DIR`.

`membership` asks who was in the training data, `vocabulary` which words were, `poisoning` what one domain
can do to everybody's model, `privacy` what differential privacy costs and what it leaves of `membership`.
`lab` makes the vectors, each once and kept on disk, `run` writes the tables. All of it needs what no attacker
of a deployment has, the truth, and exists for simulations alone.
"""
