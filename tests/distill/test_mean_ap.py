"""COCO's mean average precision against numbers worked out by hand, and pooled over two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
pytest.importorskip("torchmetrics", reason="torchmetrics is not installed: pip install 'relu-deploy[torch]'")
pytest.importorskip("pycocotools", reason="pycocotools is not installed: pip install 'relu-deploy[torch]'")
from relu_deploy.distill.mean_ap import CocoMeanAveragePrecision  # noqa: E402
from relu_deploy.errors import DataError  # noqa: E402

pytestmark = pytest.mark.torch


def found(*rows):
    """Boxes of an image from rows of x1, y1, x2, y2, score, label."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return {"boxes": table[:, :4], "scores": table[:, 4], "labels": table[:, 5].long()}


def truth(*rows):
    """The same without scores."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    return {"boxes": table[:, :4], "labels": table[:, 4].long()}


BOX = (0, 0, 100, 100)
FAR = (200, 200, 300, 300)
CASES = {
    "exact": ([found((*BOX, 0.3, 0))], [truth((*BOX, 0))], 1.0),
    # Overlap 0.77: right at the thresholds 0.50, 0.55, ..., 0.75, which are six of ten.
    "overlap": ([found((0, 0, 100, 77, 0.9, 0))], [truth((*BOX, 0))], 0.6),
    "wrong class": ([found((*BOX, 0.9, 1))], [truth((*BOX, 0))], 0.0),
    # A false alarm scores higher: the one hit has precision 1/2 at recall 1/2, so 51 of 101 recall points count 1/2.
    "false alarm first": (
        [found((400, 0, 500, 90, 0.9, 0), (*BOX, 0.8, 0))],
        [truth((*BOX, 0), (*FAR, 0))],
        25.5 / 101,
    ),
    "false alarm last": ([found((400, 0, 500, 90, 0.7, 0), (*BOX, 0.8, 0))], [truth((*BOX, 0), (*FAR, 0))], 51 / 101),
    # The alarm is in an image without objects: precision 1/2 at every recall.
    "empty image": ([found((*BOX, 0.5, 0)), found((*FAR, 0.9, 0))], [truth((*BOX, 0)), truth()], 0.5),
    "nothing found": ([found()], [truth((*BOX, 0))], 0.0),
    "mean of classes": ([found((*BOX, 0.5, 0), (0, 0, 100, 77, 0.9, 7))], [truth((*BOX, 0), (*BOX, 7))], 0.8),
}


@pytest.mark.parametrize(("predictions", "targets", "expected"), CASES.values(), ids=CASES)
def test_by_hand(predictions, targets, expected):
    metric = CocoMeanAveragePrecision()
    for prediction, target in zip(predictions, targets, strict=True):
        metric.update([prediction], [target])
    assert metric.compute()["map"].item() == pytest.approx(expected, abs=1e-6)  # float32


def test_thresholds_sizes_and_reset():
    metric = CocoMeanAveragePrecision()
    metric.update([found((0, 0, 100, 70, 0.9, 0))], [truth((*BOX, 0))])
    values = metric.compute()
    assert [values[name].item() for name in ("map_50", "map_75", "map_small")] == [1.0, 0.0, -1.0]
    assert values["map_large"].item() == pytest.approx(0.5, abs=1e-6)  # 0.50 to 0.70, five of ten
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update``"), pytest.raises(DataError, match="no images"):
        metric.compute()
    with pytest.raises(DataError, match="1 predictions for 2 images"):
        metric.update([found()], [truth(), truth()])


# Process 0 has two images and three boxes, process 1 one image and no detection.
SCRIPT = """
import json, os, sys
import torch
sys.path.insert(0, {folder!r})
from test_mean_ap import BOX, FAR, found, truth
from relu_deploy.distill.mean_ap import CocoMeanAveragePrecision
from relu_deploy.distill.tasks import QuestionAnsweringTask
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
metric, squad = CocoMeanAveragePrecision(), QuestionAnsweringTask(lambda o, t: (o, t)).measures()
said = lambda text: [{{"id": str(rank), "prediction_text": text}}]
meant = lambda text: [{{"id": str(rank), "answers": {{"text": [text], "answer_start": [0]}}}}]
if rank == 0:
    metric.update([found((*BOX, 0.5, 0)), found((*FAR, 0.9, 0), (*BOX, 0.1, 0))], [truth((*BOX, 0)), truth()])
    squad.update(said("black cat"), meant("cat sat"))
else:
    metric.update([found()], [truth((*BOX, 0))])
    squad.update(said("the cat"), meant("cat"))
values = {{"map": metric.compute()["map"].item(), **{{k: v.item() for k, v in squad.compute().items()}}}}
if rank == 0:
    print(json.dumps(values), flush=True)
# Gloo's threads abort a process at times while it ends.
os._exit(0)
"""


def test_two_processes_are_pooled(tmp_path):
    (tmp_path / "pool.py").write_text(SCRIPT.format(folder=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*command, str(tmp_path / "pool.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    # Of two truths one is found, behind a false alarm: precision 1/2 at 51 of 101 recall points.
    assert values["map"] == pytest.approx(25.5 / 101, abs=1e-6)
    # "cat" of two words each is a half, "the" does not count: (50 + 100) / 2 and (0 + 100) / 2.
    assert values["f1"] == pytest.approx(75)
    assert values["exact_match"] == pytest.approx(50)
