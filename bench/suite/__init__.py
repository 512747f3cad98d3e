"""Every check that wants a GPU, in one run under ten minutes; on a CPU with small sizes it tests itself."""
