"""One forward and one backward, observed: operations, the graph, lines of code, cuts."""
