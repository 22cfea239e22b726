"""The Tritons: what they are asked, what they serve, which are away."""
