"""How good are the merges? One command a table: `isthmus study TABLE CONFIG --out DIR`.

`tables` says which models a table compares, `lab` makes them (fine-tuned, merged, evaluated in this process,
each once and kept on disk), `score` turns ranks of single users into figures with their uncertainty. It needs
every domain's interactions in one place: it exists for simulations alone.
"""
