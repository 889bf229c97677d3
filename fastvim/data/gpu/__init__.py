"""Images decoded, resized and augmented in batches on a GPU: `planned`, `files`, `finish`."""
