"""Independent witnesses: processes that hold keys and tree heads, and cosign logs that grow consistently."""
