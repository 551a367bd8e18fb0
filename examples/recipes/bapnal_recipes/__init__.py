"""Recipes: from PASCAL VOC to the paper's tables, with bapnal."""
