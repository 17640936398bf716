"""Methods for vision encoders: the equations of one paper a file, on `tokred.core` and `tokred.ops` alone."""
