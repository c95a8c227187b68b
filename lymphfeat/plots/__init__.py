"""All matplotlib figures except those of `explanation`."""
