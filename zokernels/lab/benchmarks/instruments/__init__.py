"""What looks at the engine from inside: compiled kernels, shapes of groups, bytes of scratch."""
