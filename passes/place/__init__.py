"""Where the cuts go: the sweep over the captured graph, blocks, named points and error taps."""
