"""Masks of SAM, prompted with the boxes, as the second label map of the noise-aware loss.

Where Y_crf and SAM's masks agree, pixels are reliable; where they do not, the loss looks at the
features. So neither of the two has to be right everywhere.
"""

import torch
from torch import Tensor
from transformers import SamModel, SamProcessor

BACKGROUND = 0


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
    found = torch.full(image.shape[1:], BACKGROUND)
    if len(boxes) == 0:
        return found
    inputs = processor(images=image, input_boxes=[boxes.tolist()], return_tensors="pt")
    out = model(**inputs, multimask_output=False)
    masks = processor.image_processor.post_process_masks(
        out.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
    )[0][:, 0]  # (K, H, W) bool
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for i in areas.argsort(descending=True).tolist():
        x1, y1, x2, y2 = boxes[i].round().long().tolist()
        inside = torch.zeros_like(masks[i])
        inside[max(0, y1) : y2, max(0, x1) : x2] = True
        found[masks[i] & inside] = labels[i]
    return found
