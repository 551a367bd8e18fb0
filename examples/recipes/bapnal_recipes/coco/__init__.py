"""The paper's experiments on MS-COCO, one module per stage."""
