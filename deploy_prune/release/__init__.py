"""What ships: the bundle, its manifest, and the check that both are whole."""
