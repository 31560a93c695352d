"""Names the installed components; holds no code of its own."""
