"""How work is run: devices, processes, files, hashes, progress."""
