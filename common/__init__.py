"""What both shores must agree on: wire, vectors, signing, ledger, catalog, models, metrics, errors."""
