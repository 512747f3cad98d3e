"""The few modules that a cut puts in place of a library's own; imported only when a model is cut."""
