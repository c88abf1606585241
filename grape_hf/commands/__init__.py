"""What the subcommands of ``grape-hf`` do that is not in the package's public functions already."""
