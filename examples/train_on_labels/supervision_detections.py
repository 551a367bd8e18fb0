"""Masks for the detections of any model that supervision reads."""

import numpy as np
import supervision as sv

from bapnal.label import Labeler


def add_masks(labeler: Labeler, image: np.ndarray, detections: sv.Detections) -> sv.Detections:
    """Return detections with a mask for each box; ``image`` is BGR, as OpenCV reads it."""
    y = labeler(image[..., ::-1], detections.xyxy, detections.class_id + 1)
    detections.mask = y.masks.numpy()
    detections.data["doubtful"] = y.doubtful.numpy()
    return detections
