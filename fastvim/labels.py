"""Labels of pixels, as tasks and data agree on them."""

IGNORE_INDEX = 255  # of a pixel that counts neither in a loss nor in a metric
