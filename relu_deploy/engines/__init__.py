"""Engines: build one for a target, say what the compiler really did with the network, open it and run it."""
