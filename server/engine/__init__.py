"""`isthmus merge`: merge local model folders by a recipe, without a server and without a network.

`recipe` says what to merge, `folders` what lies in a model folder, `stream` reads task vectors from folders
block by block, `staging` writes the merged folder whole or not at all, `run` puts them together. A
training-free merge of weights imports no torch, no pyarrow and no pydantic: what takes long to import is
imported where it is needed.
"""
