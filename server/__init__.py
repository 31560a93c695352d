"""The merge server's shore: admission, merging, learning and publishing; never an interaction."""
