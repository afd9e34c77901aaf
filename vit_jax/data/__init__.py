"""From a name to batches: sources, order, augmentation, pipeline. Knows no model."""
