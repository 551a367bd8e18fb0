"""What a stranger's `import bapnal` does: silent, quick, two dependencies, and the public names."""

import importlib.metadata
import importlib.resources
import inspect
import json
import subprocess
import sys

import pytest
import torch

import bapnal

PUBLIC = [
    ("BackgroundAttention", "background_attention"),
    ("BackgroundAwarePooling", "background_aware_pooling"),
    ("CosineClassifier", "cosine_similarity"),
    ("PseudoLabelGenerator", "pseudo_labels"),
    ("NoiseAwareLoss", "noise_aware_loss"),
    ("EntropyRegularizationLoss", "entropy_regularization_loss"),
    ("BootstrappingLoss", "bootstrapping_loss"),
]
FUNCTIONS = ["grid_prototypes", "box_classification_loss", "confidence_map", "poly_schedule"]


def python(code, *flags):
    """Run code in a fresh interpreter; what it printed must be one JSON value and nothing else."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_import_is_silent_quick_and_changes_nothing():
    found = python(
        """
import json, sys, time, warnings
import numpy, torch
warnings.simplefilter("error")
before = set(sys.modules)
state = lambda: (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
                 torch.initial_seed(), torch.are_deterministic_algorithms_enabled())
old, start = state(), time.perf_counter()
import bapnal
seconds = time.perf_counter() - start
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps([seconds, sorted(new - set(sys.stdlib_module_names)), state() == old]))
"""
    )
    seconds, modules, unchanged = found
    assert seconds < 2  # a busy machine; 0.05 on an idle one
    assert set(modules) <= {"bapnal", "torch", "numpy"}
    assert unchanged


def test_import_needs_torch_and_numpy_alone():
    """With every optional dependency missing, the core still works."""
    assert python(
        """
import json, sys
for name in ("torchvision", "pydensecrf", "scipy", "PIL", "matplotlib", "timm", "skimage",
             "torchmetrics", "rich", "tyro", "defusedxml", "hypothesis", "pytest"):
    sys.modules[name] = None
import torch, bapnal
x = torch.rand(1, 4, 5, 5)
boxes, labels = [torch.tensor([[1.0, 1.0, 8.0, 9.0]])], [torch.tensor([1])]
out = bapnal.BackgroundAwarePooling()(x, boxes, (10, 10))
loss = bapnal.box_classification_loss(out, torch.rand(3, 4), labels)
image = torch.zeros(1, 3, 10, 10, dtype=torch.uint8)
y = bapnal.PseudoLabelGenerator()(image, x, torch.rand(3, 4), boxes, labels)
classifier = bapnal.CosineClassifier(4, 3)
loss = loss + bapnal.NoiseAwareLoss()(classifier(x), classifier.similarity(x), y.crf, y.retrieval)
print(json.dumps(bool(torch.isfinite(loss))))
"""
    )


def test_public_names():
    assert len(bapnal.__all__) == len(set(bapnal.__all__))
    for name in bapnal.__all__:
        assert not name.startswith("_")
        thing = getattr(bapnal, name)
        if not name.isupper():  # a constant knows neither
            assert thing.__module__.startswith("bapnal")
            assert thing.__doc__
    expected = {name for pair in PUBLIC for name in pair} | {*FUNCTIONS, "DenseCRF"}
    assert expected <= set(bapnal.__all__)
    scope = {}
    exec("from bapnal import *", scope)
    assert expected <= set(scope)


@pytest.mark.parametrize(("module", "function"), PUBLIC)
def test_module_and_function_have_the_same_defaults(module, function):
    kind, run = getattr(bapnal, module), getattr(bapnal, function)
    assert issubclass(kind, torch.nn.Module)
    there = inspect.signature(run).parameters
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        if name == "self" or module == "CosineClassifier":
            continue
        assert name in there
        if there[name].default is not inspect.Parameter.empty:
            assert parameter.default == there[name].default, name


@pytest.mark.parametrize("name", [name for pair in PUBLIC for name in pair] + FUNCTIONS)
def test_docstrings_have_every_part(name):
    thing = getattr(bapnal, name)
    doc = inspect.getdoc(thing)
    wanted = ["Args:", "Example:", "Raises:"] + ([] if inspect.isclass(thing) else ["Returns:"])
    if name == "BackgroundAttention":
        wanted.remove("Raises:")
    for part in wanted:
        assert part in doc
    for argument in inspect.signature(thing).parameters:
        assert f"{argument}: " in doc, argument


def test_types_are_for_everyone():
    assert importlib.resources.files("bapnal").joinpath("py.typed").is_file()


def test_a_strangers_typed_code_runs():
    import typed_use

    torch.manual_seed(0)
    images = torch.randint(256, (1, 3, 24, 32)).to(torch.uint8)
    boxes, labels = [torch.tensor([[4.0, 4.0, 20.0, 20.0]])], [torch.tensor([1])]
    network = typed_use.BoxClassifier(8, 3)
    assert network.loss(images, boxes, labels).isfinite()
    y = typed_use.label(network, images, boxes, labels)
    assert y.crf.shape == (1, 24, 32)
    assert typed_use.segmentation_loss(torch.randn(1, 8, 6, 8), 3, y).isfinite()
    assert typed_use.smooth(torch.ones(5, 2), torch.randn(5, 3)).shape == (5, 2)


def test_version():
    assert bapnal.__version__.count(".") >= 2
    assert importlib.metadata.version("bapnal") == bapnal.__version__


def test_run_time_dependencies():
    required = [
        line.partition(";")[0].split(">")[0].strip()
        for line in importlib.metadata.requires("bapnal") or []
        if "extra ==" not in line
    ]
    assert sorted(required) == ["numpy", "torch"]
