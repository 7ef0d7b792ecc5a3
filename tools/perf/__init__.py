"""The performance gate: deterministic figures of the compiler, against those recorded."""
