"""What a training directory holds: written whole, and checked when it is read."""
