"""Data: batches of any structure, where their samples are, and parts of them."""
