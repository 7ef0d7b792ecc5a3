"""What every pass works with: emitting nodes, markers, order, folds of dims, verification."""
