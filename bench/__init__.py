"""What it costs to run: interleaved timings, their statistics, and the runtimes they are taken on."""
