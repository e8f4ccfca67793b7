"""INT8 accuracy of this package and of other quantisers on the same networks, samples and metrics."""
