"""The parts of the benchmark: each measures one question and adds to the results."""
