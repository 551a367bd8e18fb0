"""Masks of SAM, prompted with the boxes, as the second label map of the noise-aware loss.

Where Y_crf and SAM's masks agree, pixels are reliable; where they do not, the loss looks at the
features. So neither of the two has to be right everywhere.
"""

import torch
from torch import Tensor
from transformers import SamModel, SamProcessor

from bapnal import paint_boxes


@torch.inference_mode()
def label_map(
    model: SamModel, processor: SamProcessor, image: Tensor, boxes: Tensor, labels: Tensor
) -> Tensor:
    """Turn boxes into a label map; ``(H, W)`` long.

    Args:
        model: ``SamModel.from_pretrained("facebook/sam-vit-base")``, say.
        processor: Of the same name.
        image: RGB, uint8; ``(3, H, W)``.
        boxes: xyxy in pixels, half open; ``(K, 4)``.
        labels: 1..L; ``(K,)``.

    Returns:
        The class of every pixel. Masks are kept to their boxes; smaller boxes lie on top.
    """
    size = (image.shape[1], image.shape[2])
    if len(boxes) == 0:
        return torch.zeros(size, dtype=torch.long)
    inputs = processor(images=image, input_boxes=[boxes.tolist()], return_tensors="pt")
    out = model(**inputs, multimask_output=False)
    masks = processor.image_processor.post_process_masks(
        out.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
    )[0][:, 0]  # (K, H, W) bool
    return paint_boxes(boxes, labels, size, masks=masks)
