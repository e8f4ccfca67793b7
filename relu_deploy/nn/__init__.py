"""The torch side: blends of an activation with ReLU, and the swap that puts them into a model. Needs torch."""
