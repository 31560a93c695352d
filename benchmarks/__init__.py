"""The scripts behind every figure. A package, because opacus installs one of the same name."""
