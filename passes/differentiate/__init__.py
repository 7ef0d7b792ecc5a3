"""Forward graph to joint graph and tangents, with one tangent rule an operator."""
