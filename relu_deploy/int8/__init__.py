"""INT8: number formats, placement of Q/DQ, clip fusion, and the quantised file."""
