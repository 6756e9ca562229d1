"""The processes that share the samples of a risk, and all that they exchange."""
