"""Language models and adapters: what both shores need."""
