"""The driver of the experiments on real images: its jobs, their order and what it copies.

The scripts that it runs are tested elsewhere; here they only note what they were asked for.
"""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import voc_animals
import voc_animals_confidence
from bapnal_recipes.engine import series
from bapnal_recipes.voc2012 import tables

KINDS = {
    "train_classifier": "classifier",
    "search": "search",
    "generate_labels": "labels",
    "train_segmentation": "segmentation",
}
SCRIPTS = ("train_classifier", "search", "generate_labels", "train_segmentation", "evaluate")


@pytest.fixture
def asked(monkeypatch):
    """Settings that the scripts were called with, in order; each leaves a result file."""
    found = []

    def note(settings):
        found.append(settings)
        path = settings.out if settings.out.suffix == ".json" else settings.out / "result.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = {entry.name: str(getattr(settings, entry.name)) for entry in fields(settings)}
        kind = KINDS.get(type(settings).__module__.rpartition(".")[2], "evaluation")
        content = {"kind": kind, "settings": plain, "scores": {"loss": 0.5, "rows": []}}
        path.write_text(json.dumps(content | {"what": "boxes"}), encoding="utf-8")

    for name in SCRIPTS:
        monkeypatch.setattr(getattr(voc_animals, name), "main", note)
    monkeypatch.setattr(voc_animals, "stage1_weights", lambda *_: None)
    return found


@pytest.fixture
def settings(tmp_path):
    root = tmp_path / "data/voc-animals/VOCdevkit/VOC2012"
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    names = [f"2007_{i:06d}" for i in range(25)]
    (lists / "train_aug.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    folders = {name: tmp_path / name for name in ("work", "out", "series")}
    return voc_animals.Settings(root=root, **folders)


def test_each_job_finds_what_earlier_ones_wrote(asked, settings):
    voc_animals.main(settings)
    written = set()
    for one in asked:
        for name in ("classifier", "search", "labels", "folder", "segmenter"):
            path = getattr(one, name, None)
            if isinstance(path, Path):
                assert path in written or path.parent in written, one
        assert one.out not in written, one.out
        written.add(one.out)
    assert len(asked) > 100


def test_labels_are_made_from_the_boxes_that_stage_1_saw(asked, settings):
    voc_animals.main(replace(settings, parts=("classifiers", "labels", "conditions")))
    trained = {one.out.name: one.margin for one in asked if hasattr(one, "pool")}
    labelled = {one.classifier.parent.name: one.margin for one in asked if hasattr(one, "crf")}
    assert labelled == {name: trained[name] for name in labelled}
    assert set(labelled.values()) == {0.0, voc_animals.MARGIN}


def test_what_is_finished_is_not_run_again(asked, settings):
    voc_animals.main(settings)
    first = len(asked)
    (settings.out / "evaluate_labels_val_box.json").unlink()
    voc_animals.main(settings)
    assert [one.out.name for one in asked[first:]] == ["evaluate_labels_val_box.json"]


def test_jobs_can_be_named(asked, settings):
    voc_animals.main(replace(settings, parts=("baselines",), only=("wssl", "box")))
    assert [one.out.name for one in asked] == [
        *("box", "evaluate_labels_val_box.json"),
        *("wssl", "evaluate_labels_val_wssl.json"),
    ]
    with pytest.raises(ValueError, match=r"parts must be among classifiers, .*, got baseline"):
        voc_animals.main(replace(settings, parts=("baseline",)))


def test_what_is_finished_is_told_by_its_result_alone(asked, settings):
    voc_animals.main(replace(settings, parts=("classifiers",)))
    first = len(asked)
    (settings.work / "classifier/gap_1/result.json").unlink()
    voc_animals.main(replace(settings, parts=("classifiers",)))
    assert [one.out.name for one in asked[first:]] == ["gap_1"]


def test_numbers_go_to_series_that_name_no_machine(asked, settings):
    voc_animals.main(settings)
    written = {path.name for path in settings.series.iterdir() if path.name[0] != "."}
    assert {"runs.jsonl", "runs.csv", "boxes.jsonl", "shared.json"} <= written
    for path in settings.series.iterdir():
        assert str(settings.root.parents[3]) not in path.read_text(encoding="utf-8"), path
    rows = series.read(settings.series / "runs.jsonl")
    assert {row["kind"] for row in rows} == {"classifier", "labels", "segmentation"}


def test_what_was_measured_before_an_interruption_is_kept(asked, settings, monkeypatch):
    def stop(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(voc_animals.search, "main", stop)
    with pytest.raises(KeyboardInterrupt):
        voc_animals.main(settings)
    assert (settings.series / "runs.jsonl").is_file()


RESULTS = Path(__file__).parents[1] / "results"
here = pytest.mark.skipif(not RESULTS.is_dir(), reason="results are in a checkout alone")


@here
def test_tables_beside_the_series_are_up_to_date(tmp_path):
    paths = sorted(RESULTS.rglob("*.jsonl"))
    assert paths
    for path in paths:
        copy = tmp_path / path.name
        copy.write_bytes(path.read_bytes())
        series.write(copy, series.read(copy))
        assert copy.read_bytes() == path.read_bytes(), f"{path} is not as series.write sorts it"
        leave_out = ("rates",) if path.stem == "filling" else ()
        assert (
            series.write_csv(copy, leave_out).read_bytes() == path.with_suffix(".csv").read_bytes()
        )


@here
def test_the_page_is_up_to_date(tmp_path, monkeypatch):
    monkeypatch.chdir(RESULTS.parents[1])
    folder = Path("benchmarks/results/voc_animals")
    tables.main(tables.Settings((folder,), tmp_path / "voc_animals.md", photographs=False))
    text = Path("docs/voc_animals.md").read_text(encoding="utf-8")
    assert (tmp_path / "voc_animals.md").read_text(encoding="utf-8") == text
    assert len(text.splitlines()) <= 250


def test_area_under_roc_counts_pairs():
    generator = torch.Generator().manual_seed(0)
    right, wrong = (torch.randint(5, (n,), generator=generator) for n in (40, 30))
    pairs = right[:, None] - wrong
    expected = float((pairs > 0).double().mean() + (pairs == 0).double().mean() / 2)
    counts = (torch.bincount(x, minlength=5).double() for x in (right, wrong))
    assert voc_animals_confidence.area_under_roc(*counts) == pytest.approx(expected)


def test_gradient_of_the_unreliable_part_is_what_lambda_adds():
    generator = torch.Generator().manual_seed(0)
    cosine = 2 * torch.rand(1, 3, 8, 8, generator=generator) - 1
    first = torch.randint(3, (1, 8, 8), generator=generator)
    same = voc_animals_confidence.gradients(cosine, first, first, 7.0)
    assert torch.equal(same[0], same[1])  # where nothing differs, lambda has nothing to weigh
    second = first.roll(1, 2)
    one, whole, detached = voc_animals_confidence.gradients(cosine, first, second, 7.0)
    assert (whole - one).norm() > 0 < (whole - detached).norm()
    assert not one[:, :, (first != second)[0]].any()
