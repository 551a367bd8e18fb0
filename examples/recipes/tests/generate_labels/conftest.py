"""Twelve synthetic images, a classifier with random weights, and settings of stage 2."""

from __future__ import annotations

import pytest
from labels_run import CPU, CRF, write_classifier

import shapes
from bapnal_recipes.voc2012.generate_labels import Settings


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return shapes.write_shapes(tmp_path_factory.mktemp("drawn"), 12, 4, 64)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("classifier") / "classifier.pt")


@pytest.fixture
def settings(drawn, classifier, tmp_path):
    return Settings(
        root=drawn,
        out=tmp_path / "out",
        split="val",
        classes=shapes.CLASSES,
        classifier=classifier,
        crf=CRF,
        machines=CPU,
    )
