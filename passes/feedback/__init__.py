"""What a method puts in the place of a cut's gradient, one file a mechanism."""
