"""One operation a file: contract, reference in plain torch, kernel, door."""
