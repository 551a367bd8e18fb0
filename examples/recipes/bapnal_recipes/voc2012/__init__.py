"""The paper's experiments on PASCAL VOC 2012, one module per stage."""
