"""Distillation: the papers' losses and the training loop. Needs the ``torch`` extra."""
