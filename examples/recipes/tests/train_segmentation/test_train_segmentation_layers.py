"""Which layers stage 3 trains and at which rates, interruptions, confidence maps, logs."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from segmentation_run import SIDE, change, names_of
from torch.nn import functional as F

from bapnal_recipes.data.label_maps import read_label_map
from bapnal_recipes.data.voc import Devkit
from bapnal_recipes.engine import stage
from bapnal_recipes.engine.batches import steps_per_epoch
from bapnal_recipes.engine.logs import Logging
from bapnal_recipes.engine.machines import Machines
from bapnal_recipes.models.segmenter import load_segmenter
from bapnal_recipes.voc2012 import train_segmentation
from bapnal_recipes.voc2012.confidence import moments
from bapnal_recipes.voc2012.train_segmentation import PRESETS, Objective, SegmentationStage, main


def train_as_rank(fabric, settings):
    """Train in one of several processes, and note how that ended."""
    settings.out.parent.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "launch", lambda machines: fabric)
        try:
            main(settings)
            ending = "finished"
        except (OSError, SystemExit) as error:
            ending = repr(error)
    (settings.labels.parent / f"rank{fabric.global_rank}").write_text(ending)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_confidence_map_that_rank_zero_cannot_write_ends_all_ranks(
    settings, own_labels, two_processes
):
    settings = change(settings, labels=own_labels, confidence_of=names_of(settings)[:1])
    settings.out.mkdir()
    (settings.out / "confidence").touch()
    two_processes(train_as_rank, settings)
    zero, one = ((own_labels.parent / f"rank{rank}").read_text() for rank in range(2))
    assert re.search(r"^OSError\('.*confidence/.*_000000\.png could not be written", zero)
    assert one == "SystemExit(1)"


# ---------------------------------------------------------------- confidence maps, logs, networks


def test_confidence_maps_are_kept_and_change_nothing(settings):
    name = names_of(settings)[2]
    settings = change(settings, iterations=5, gamma=2.0)
    main(change(settings, out=settings.out / "plain"))
    main(change(settings, out=settings.out / "kept", confidence_of=(name,), confidence_every=1))
    folder = settings.out / "kept/confidence"
    steps = (0, 2, 5)  # two steps an epoch, and 4 is too near to the end
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}_{i:06d}.png" for i in steps]
    maps = [Image.open(folder / f"{name}_{i:06d}.png") for i in steps]
    assert all(found.mode == "L" and found.size == (SIDE, SIDE) for found in maps)
    assert len({found.tobytes() for found in maps}) == 3
    states = []
    for run in ("plain", "kept"):
        network, _, _ = load_segmenter(settings.out / run / "segmenter.pt")
        states.append(network.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    devkit = Devkit(settings.root, settings.classes)
    labels = read_label_map(settings.labels / f"crf/{name}.png")
    with torch.no_grad():
        _, similarity = network(devkit.image(name)[None])
    distance = 1 + F.interpolate(similarity, size=(SIDE, SIDE), mode="bilinear")[0]
    own = distance.gather(0, labels[None])[0]
    sigma = (own / distance.amax(0)) ** 2
    found = torch.from_numpy(np.array(maps[-1]))
    assert (found - 255 * sigma).abs().max() < 0.51
    assert sigma.std() > 0.01


def test_the_figure_of_the_paper_gets_its_epochs():
    _, paper = PRESETS["paper"]
    epoch = steps_per_epoch(10_582, paper.batch_size)
    kept = moments(paper.epochs * epoch, paper.confidence_every * epoch)
    assert sorted(step / 529 for step in kept) == [0, 11, 22, 33, 45]


def test_numbers_and_images_are_logged(settings):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    main(change(settings, logging=Logging(interval=2), iterations=4))
    events = EventAccumulator(str(settings.out / "logs"))
    events.Reload()
    tags = events.Tags()
    for tag in ("loss", "lr/features", "share unreliable", "sigma on unreliable"):
        assert [event.step for event in events.Scalars(tag)] == [2, 4], tag
    assert 0 < events.Scalars("share unreliable")[0].value < 0.6
    assert 0 < events.Scalars("sigma on unreliable")[0].value < 1
    assert [tag.split()[-1] for tag in sorted(tags["images"])] == [
        *("input", "labels", "prediction", "confidence")
    ]


@pytest.fixture
def pretrained(settings, tmp_path):
    """A network of timm with weights from a file, so that batch normalisation is frozen."""
    import timm

    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "weights.pt")
    return change(
        settings,
        network="test_efficientnet",
        weights=str(tmp_path / "weights.pt"),
        lr=0.001,
        iterations=2,
    )


def test_pretrained_layers_have_a_rate_of_their_own(pretrained, settings):
    network = SegmentationStage(pretrained).build_network()
    found = SegmentationStage(pretrained).optimizer(network).param_groups
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in found} == {
        "features": (0.001, 5e-4),
        "features biases": (0.002, 0),
        "head": (0.01, 5e-4),
    }
    assert {id(p) for p in found[2]["params"]} == {id(p) for p in network.classifier.parameters()}
    small = SegmentationStage(settings).build_network()
    found = SegmentationStage(settings).optimizer(small).param_groups
    # Nothing of it was pretrained; the biases are those of batch normalisation.
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in found} == {
        "features": (0.01, 5e-4),
        "features biases": (0.02, 0),
        "head": (0.01, 5e-4),
    }


@pytest.mark.parametrize("train", [False, True])
def test_batch_normalisation_is_trained_on_request(pretrained, train):
    main(change(pretrained, train_batch_norm=train))
    before = SegmentationStage(pretrained).build_network().state_dict()
    after = load_segmenter(pretrained.out / "segmenter.pt")[0].state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert any("running_mean" in key for key in changed) == train
    assert any("bn1.weight" in key for key in changed) == train
    assert any("conv" in key for key in changed)


def test_the_first_blocks_may_stay_as_they_are(pretrained):
    main(change(pretrained, frozen_stages=1))
    before = SegmentationStage(pretrained).build_network().state_dict()
    after = load_segmenter(pretrained.out / "segmenter.pt")[0].state_dict()
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert any("conv_stem" in key for key in same)
    assert any(key not in same for key in before if "blocks.2" in key)


# -------------------------------------------------------------------- interruptions and mistakes


def test_an_interrupted_run_ends_with_the_same_weights(settings, monkeypatch):
    settings = change(settings, checkpoint_interval=2, iterations=5)
    whole = Objective.__call__

    def interrupted(self, network, batch, step):
        if step == 3:
            raise KeyboardInterrupt
        return whole(self, network, batch, step)

    main(change(settings, out=settings.out / "unbroken"))
    monkeypatch.setattr(Objective, "__call__", interrupted)
    broken = change(settings, out=settings.out / "broken")
    with pytest.raises(KeyboardInterrupt):
        main(broken)
    assert not (broken.out / "result.json").exists()
    monkeypatch.undo()
    main(broken)
    states = [
        load_segmenter(settings.out / run / "segmenter.pt")[0].state_dict()
        for run in ("unbroken", "broken")
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_finished_run_is_not_repeated(settings, monkeypatch, tmp_path):
    found = main(settings)
    monkeypatch.setattr(train_segmentation, "build_segmenter", None)
    assert main(settings) == found
    assert main(change(settings, labels=settings.labels, machines=Machines(workers=3))) == found
    with pytest.raises(ValueError, match=r"belongs to another run \(loss='nal' there, 'crf' now\)"):
        main(change(settings, loss="crf"))
