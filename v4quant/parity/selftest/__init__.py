"""Plant the faults that conversions really have into the user's own tensors, and see which check catches each."""
