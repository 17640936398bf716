"""Methods for vision encoders. Each file holds one method's equations and imports `tokred.core` and `tokred.ops` only."""
