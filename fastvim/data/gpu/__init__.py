"""Training images decoded and augmented in batches on a GPU: `planned`, `files`, `finish`."""
