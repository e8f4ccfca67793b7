"""The whole flow at a size that trains in a minute: scikit-learn's digits, a small residual network with SiLU."""
