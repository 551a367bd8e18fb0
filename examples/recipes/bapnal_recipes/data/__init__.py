"""Data sets: images, boxes, label maps, metrics."""
