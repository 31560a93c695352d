"""Generated stubs of the data channel; `generate.py` makes them again."""
