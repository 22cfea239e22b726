"""What a lane holds, and how much more it may."""
