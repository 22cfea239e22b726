"""From requests to Triton's answers: micro-batches, suspects, sequences."""
