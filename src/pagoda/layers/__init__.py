"""The parts that a model is made of: linears by role and scheme, embedding, rope, attention, cache schemes."""
