"""The `lymphfeat` command: parses, calls one library function, shows what came back."""
