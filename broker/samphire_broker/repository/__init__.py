"""Model repositories: a folder of models, its mirror that the embedded Triton serves, and loads by Triton."""
