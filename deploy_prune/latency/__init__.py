"""Members at a latency: a table of what sites cost on a runtime, what leaving costs, and the choice between them."""
