"""The page: what it holds, in which order, and that it needs no server and no network."""

import json
import re
import threading
import urllib.error
import urllib.request

import pytest

from bapnal.label import report
from bapnal.label.report import serve, write_report
from label_data import change, label


@pytest.fixture
def labelled(copy, tmp_path):
    def edit(content):
        first = {**content["annotations"][4], "bbox": [40, 40, 2, 2]}
        content["annotations"] += [{**first, "id": 900 + i} for i in range(3)]

    change(copy, edit)
    label(copy, "coco", tmp_path / "out")
    return tmp_path / "out"


def content(out):
    page = (out / "report.html").read_text()
    found = re.search(r'<script type="application/json" id="content">(.*?)</script>', page, re.S)
    data = json.loads(found[1])
    return page, data, [dict(zip(data["keys"], row, strict=True)) for row in data["rows"]]


def test_the_doubtful_come_first(labelled):
    _, data, rows = content(labelled)
    assert len(rows) == 4
    assert [row["score"] for row in rows] == sorted((r["score"] for r in rows), reverse=True)
    assert rows[0]["name"] == "image2.jpg"
    assert rows[0]["counts"]["duplicate"] == 2
    assert rows[0]["counts"]["tiny"] == 3
    assert data["summary"]["labelled"] == 4
    assert len(data["colours"]) == 3


def test_it_is_one_file_that_loads_images_as_they_are_scrolled_to(labelled):
    page, data, rows = content(labelled)
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page
    assert 'loading: "lazy"' in page
    assert "/*CONTENT*/" not in page
    assert (labelled / data["base"] / rows[0]["file"]).is_file()
    for row in rows:
        for folder, suffix in (("thumbnails", "jpg"), ("labels", "png"), ("unreliable", "png")):
            assert (labelled / folder / f"{row['labels']}.{suffix}").is_file()


def test_it_stays_light_with_10_000_images(labelled, monkeypatch):
    record = report.read_record(labelled, "image2")
    record["boxes"] = record["boxes"][:1] * 7
    monkeypatch.setattr(report, "_names", lambda out: [f"image{i}" for i in range(10_000)])
    monkeypatch.setattr(report, "read_record", lambda out, name: record)
    path = write_report(labelled)
    assert path.stat().st_size < 5_000_000


def test_names_cannot_leave_the_script(labelled):
    path = labelled / "summary.json"
    summary = json.loads(path.read_text())
    summary["broken"] = {"a": "</script><script>alert(1)</script>"}
    summary["classes"][0]["name"] = "<!--"
    path.write_text(json.dumps(summary))
    write_report(labelled)
    page, data, _ = content(labelled)
    assert "</script><script>alert" not in page
    assert data["summary"]["broken"] == ["</script><script>alert(1)</script>"]


def test_it_can_be_served_with_its_images_alone(labelled):
    with serve(labelled, port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        start = f"http://127.0.0.1:{server.server_port}/"

        def get(path):
            with urllib.request.urlopen(start + path) as answer:
                return answer.read()

        assert b"Labels from boxes" in get("")
        assert get("_images/image0.jpg")[:2] == b"\xff\xd8"
        for path in ("_images/../coco.json", "_images/%2e%2e/coco.json", "../copy/coco.json"):
            with pytest.raises(urllib.error.HTTPError, match="404") as caught:
                get(path)
            caught.value.close()
        server.shutdown()


def test_a_folder_without_labels_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold labels"):
        write_report(tmp_path)
