"""What runs have written, read again and drawn."""
