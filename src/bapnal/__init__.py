"""Pixel labels from object boxes, and training on such noisy labels, in the order of the method."""

from bapnal._zoom import ZoomedBoxes
from bapnal.attention import (
    Attention,
    BackgroundAttention,
    background_attention,
    grid_prototypes,
)
from bapnal.boxes import box_bins, box_cells, box_coverage, definite_background, paint_boxes
from bapnal.classifier import CosineClassifier, cosine_similarity
from bapnal.crf import DenseCRF, PairwiseTerm, PermutohedralLattice, dense_crf
from bapnal.instance_refine import MaskHead, box_mask_loss, fit_mask_head
from bapnal.instances import (
    InstanceLabelGenerator,
    InstanceLabels,
    box_log_odds,
    instance_crf,
    instance_labels,
)
from bapnal.losses import (
    BootstrappingLoss,
    EntropyRegularizationLoss,
    NoiseAwareLoss,
    bootstrapping_loss,
    confidence_map,
    entropy_regularization_loss,
    noise_aware_loss,
    poly_schedule,
)
from bapnal.pooling import (
    BackgroundAwarePooling,
    PooledFeatures,
    background_aware_pooling,
    box_classification_loss,
)
from bapnal.pseudo_labels import PseudoLabelGenerator, PseudoLabels, pseudo_labels
from bapnal.refine import FeatureHead, fit_feature_head
from bapnal.ridge import RidgeBoxClassifier, box_targets, ridge_weights
from bapnal.unaries import PRESETS

__all__ = [
    "box_cells",
    "box_coverage",
    "box_bins",
    "definite_background",
    "paint_boxes",
    "Attention",
    "BackgroundAttention",
    "background_attention",
    "grid_prototypes",
    "PooledFeatures",
    "BackgroundAwarePooling",
    "background_aware_pooling",
    "box_classification_loss",
    "CosineClassifier",
    "cosine_similarity",
    "RidgeBoxClassifier",
    "box_targets",
    "ridge_weights",
    "FeatureHead",
    "fit_feature_head",
    "PseudoLabels",
    "PseudoLabelGenerator",
    "pseudo_labels",
    "PRESETS",
    "InstanceLabels",
    "InstanceLabelGenerator",
    "instance_labels",
    "instance_crf",
    "ZoomedBoxes",
    "box_log_odds",
    "MaskHead",
    "fit_mask_head",
    "box_mask_loss",
    "DenseCRF",
    "dense_crf",
    "PairwiseTerm",
    "PermutohedralLattice",
    "NoiseAwareLoss",
    "noise_aware_loss",
    "confidence_map",
    "EntropyRegularizationLoss",
    "entropy_regularization_loss",
    "BootstrappingLoss",
    "bootstrapping_loss",
    "poly_schedule",
]

__version__ = "0.1.0"
