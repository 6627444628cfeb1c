"""One runnable file a training stage."""
