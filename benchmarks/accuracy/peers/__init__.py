"""Other quantisers, each run in a virtual environment of its own by a script of its own."""
