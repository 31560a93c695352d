"""The owner's shore: everything that runs where the private data lives."""
