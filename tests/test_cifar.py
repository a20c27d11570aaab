"""examples/cifar.py at toy size: what it trains, that it goes on where it ended, what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from executed_notebook import TUTORIAL
from forked import run_script
from image_folders import write_images
from oracle import relative_error, tract_gradient

sys.path.insert(0, str(TUTORIAL.parent))

import cifar
from _cifar_data import MARGIN, Crops, Images, load, standardise
from _cifar_models import FIRST_LAYER, build
from _cifar_records import Budget, read_progress, train
from _cifar_report import findings, table
from _cifar_runs import RECIPES, Progress, Run, Settings, Training, digest, plan

EXAMPLES = TUTORIAL.parent
CPU = torch.device("cpu")
TOY = Settings(batch_size=8, width=12, image_size=8)
SMALL = ["--batch-size", "8", "--width", "12", "--image-size", "8", "--device", "cpu"]
SMALL += ["--epochs", "2", "--seeds", "1", "--lambda", "0.1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def images(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Images:
    kept = tmp_path_factory.mktemp("kept") / "images.pt"
    return load(folder, kept, image_size=8, train_limit=0, test_limit=0)


def script(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = EXAMPLES / "cifar.py"
    return run_script(path, *arguments, cwd=cwd, NO_COLOR="1", COLUMNS="500")


def invoked(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(cifar.run)
    return CliRunner(env={"COLUMNS": "500", "NO_COLOR": "1"}).invoke(app, arguments)


def refused(*arguments: str) -> str:
    """The one line with which the script ends."""
    finished = invoked(*arguments)
    assert finished.exit_code == 1
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_names_and_numbers_that_mean_nothing_are_refused_before_anything_is_trained() -> None:
    for arguments in (["--recipe", "vit"], ["--lambda", "0"], ["--lambda", "nan"]):
        finished = invoked(*arguments)
        assert finished.exit_code == 2 and "Invalid value" in finished.stderr


def one(name: str, lambda_: float | None, epochs: int = 2, seed: int = 0) -> Run:
    return Run(name, RECIPES[name], lambda_, epochs, seed, TOY)


def records(out: Path) -> dict[str, Any]:
    """All that was written of the runs but the times, which differ."""
    found = {path.name: json.loads(path.read_text()) for path in out.glob("*.json")}
    for record in found.values():
        assert len(record["progress"].pop("seconds")) == len(record["progress"]["accuracies"])
    return found


def test_script_trains_and_leaves_what_it_says(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "vit-adam"
    arguments = [*SMALL, "--out", "out", "--recipe", name]
    trained = script(tmp_path, "--data", str(folder), *arguments)
    assert trained.returncode == 0, trained.stderr
    assert "Warning" not in trained.stderr
    assert "4 of 4 runs are complete\n" in trained.stdout
    written = records(tmp_path / "out")
    assert len(written) == 4
    for record in written.values():
        assert len(record["progress"]["accuracies"]) == record["run"]["epochs"]
        assert record["progress"]["weights"] and record["progress"]["devices"] == ["cpu"]
    # The arms of a seed are no copies of each other.
    assert len({record["progress"]["weights"] for record in written.values()}) == 4
    assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "out" / f"{name}.svg").read_text()
    assert [path.name for path in (tmp_path / "out").glob("*.pt")] == ["images.pt"]
    assert not [*(tmp_path / "out").glob(".*")]
    # Records alone make the same table and pictures.
    (tmp_path / "out" / "images.pt").unlink()
    monkeypatch.chdir(tmp_path)
    again = invoked(*arguments, "--budget", "0")
    assert again.exit_code == 0, again.stderr
    assert trained.stdout.endswith(again.stdout)
    assert again.stdout.count("TrAct, λ = 0.1, 1 epoch, against plain, 2 epochs: ") == 1
    message = refused(*arguments, "--learning-rate", "0.5")
    assert "learning_rate 0.001, not 0.5: give another --out" in message


class Epochs(Budget):
    """Time for so many epochs."""

    def __init__(self, count: int) -> None:
        super().__init__(None)
        self.left = count

    def allows(self, *works: tuple[str, ...]) -> bool:
        return self.left > 0

    @contextmanager
    def measured(self, work: tuple[str, ...]) -> Iterator[None]:
        yield
        self.left -= work[0] == "epoch"


@pytest.mark.parametrize(
    ("name", "lambda_"), [("resnet18-sgd", 0.1), ("resnet18-adam", None), ("vit-adam", 0.1)]
)
def test_run_that_goes_on_ends_as_one_that_was_never_stopped(
    name: str, lambda_: float | None, folder: Path, tmp_path: Path
) -> None:
    run, quiet = one(name, lambda_, epochs=3), Console(quiet=True)
    for out, parts in ("whole", [3]), ("parts", [1, 1, 1]):
        (tmp_path / out).mkdir()
        for done, count in enumerate(parts, 1):
            torch.manual_seed(done)  # nothing is drawn from what other code draws from
            train([run], folder, tmp_path / out, CPU, Epochs(count), quiet)
            found = read_progress(run, tmp_path / out)
            assert found and len(found.accuracies) == sum(parts[:done])
    assert records(tmp_path / "whole") == records(tmp_path / "parts")


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The images; after a run's first epoch has left two files, its state and its record.
@pytest.mark.parametrize("file", [1, 4, 5])
def test_killed_while_it_writes_it_leaves_whole_files_and_goes_on(
    file: int, folder: Path, one_thread: None, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["--data", str(folder), "--out", str(out), *SMALL]
    killer = Path(__file__).with_name("killed_cifar.py")
    killed = run_script(killer, str(file), str(EXAMPLES / "cifar.py"), *arguments, cwd=tmp_path)
    assert killed.returncode == -9
    (half,) = out.glob(".*")
    epochs = [len(record["progress"]["accuracies"]) for record in records(out).values()]
    assert epochs == {1: [], 4: [1], 5: [1]}[file]
    states = [torch.load(path) for path in out.glob("*seed0.pt")]
    kept = [len(state["progress"]["accuracies"]) for state in states]
    assert kept == {1: [], 4: [1], 5: [2]}[file]
    run, quiet = one("resnet18-sgd", None), Console(quiet=True)
    train([run], folder, out, CPU, Budget(None), quiet)
    assert not half.exists()  # the file that it was to be was written
    (tmp_path / "whole").mkdir()
    train([run], folder, tmp_path / "whole", CPU, Budget(None), quiet)
    assert records(out) == records(tmp_path / "whole")


@pytest.mark.parametrize("name", ["resnet18-sgd", "vit-adam"])
def test_first_layer_has_the_gradient_of_tract_and_all_others_the_plain_one(
    name: str, images: Images
) -> None:
    plain, tract = (Training(one(name, lambda_), images, CPU) for lambda_ in (None, 0.1))
    torch.manual_seed(0)
    start = build(RECIPES[name].model, 2, 8, 12)
    assert digest(plain.model) == digest(tract.model) == digest(start)
    first = f"{FIRST_LAYER[RECIPES[name].model]}.weight"
    layer = tract.model.get_submodule(first.removesuffix(".weight"))
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        output.register_hook(seen.append)

    layer.register_forward_hook(keep)
    batch, labels = images.train[:8], images.train_labels[:8]
    for training in (plain, tract):
        training.model.train()
        training.loss(batch, labels).backward()
    expected = tract_gradient(layer, standardise(batch), seen[0], 0.1)
    for parameter, theirs in zip(
        tract.model.named_parameters(), plain.model.parameters(), strict=True
    ):
        path, ours = parameter
        assert ours.grad is not None and theirs.grad is not None
        if path == first:
            # Float32 against float64.
            assert relative_error(ours.grad, expected) < 1e-5
            assert relative_error(theirs.grad, expected) > 0.1
        else:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_arms_of_a_seed_see_the_same_batches_and_each_epoch_others(images: Images) -> None:
    def seen(lambda_: float | None, seed: int) -> list[Tensor]:
        training = Training(one("resnet18-sgd", lambda_, seed=seed), images, CPU)
        batches: list[Tensor] = []
        loss = training.loss

        def spy(images: Tensor, labels: Tensor) -> Tensor:
            batches.append(images)
            return loss(images, labels)

        vars(training)["loss"] = spy
        for _ in range(2):
            training.train_epoch()
        assert len(batches) == 2 * len(images.train) // TOY.batch_size
        return [torch.cat(epoch) for epoch in (batches[:2], batches[2:])]

    plain, tract, other = seen(None, 0), seen(0.1, 0), seen(None, 1)
    assert torch.equal(plain[0], tract[0]) and torch.equal(plain[1], tract[1])
    assert not torch.equal(plain[0], plain[1]) and not torch.equal(plain[0], other[0])


def test_crops_are_cut_out_of_a_black_margin_and_half_of_them_flipped(images: Images) -> None:
    crops = Crops(images.train)
    cuts = crops.draw(torch.Generator().manual_seed(0))
    chosen = torch.tensor([5, 0, 11, 2, 3, 9])
    for place, found in zip(chosen.tolist(), crops.batch(chosen, cuts), strict=True):
        row, column, flip = cuts[place].tolist()
        padded = torch.zeros(3, 8 + 2 * MARGIN, 8 + 2 * MARGIN, dtype=torch.uint8)
        padded[:, MARGIN:-MARGIN, MARGIN:-MARGIN] = images.train[place]
        cut = padded[:, row : row + 8, column : column + 8]
        assert torch.equal(found, cut.flip(2) if flip else cut)
    many = Crops(torch.zeros(4000, 3, 8, 8, dtype=torch.uint8))
    drawn = many.draw(torch.Generator().manual_seed(0))
    assert [*drawn.amin(0)] == [0, 0, 0] and [*drawn.amax(0)] == [2 * MARGIN, 2 * MARGIN, 1]
    assert 0.45 < drawn[:, 2].double().mean() < 0.55


def test_every_seed_compares_plain_at_full_with_tract_at_half_before_the_rest() -> None:
    runs = plan({"vit-adam": RECIPES["vit-adam"]}, 8, [0.1, 0.05], 2, TOY)
    arms = [(run.lambda_, run.epochs) for run in runs]
    assert arms == 2 * [(None, 8), (0.1, 4), (0.05, 4), (0.1, 8), (0.05, 8), (None, 4)]
    assert [run.seed for run in runs] == 6 * [0] + 6 * [1]


def test_learning_rate_rises_and_falls() -> None:
    cosine = one("resnet18-sgd", None)
    assert [cosine.rate(share) for share in (0, 0.5, 1)] == pytest.approx([0.08, 0.04, 0])
    warm = one("vit-adam", None)
    rates = [warm.rate(share) for share in (0, 1 / 80, 1 / 40, 1)]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 1e-5])


def test_images_that_are_kept_are_those_that_were_asked_for(folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path)
    assert "holds no images yet: give --data" in refused(*SMALL, "--out", out)
    kept = tmp_path / "images.pt"
    load(folder, kept, image_size=8, train_limit=8, test_limit=4)
    message = refused(*SMALL, "--out", out, "--data", str(folder))
    assert (
        "holds images of images (size and limits [8, 8, 4]), not of images ([8, 0, 0])" in message
    )
    few = [*SMALL, "--train-limit", "8", "--test-limit", "4", "--batch-size", "9"]
    assert "8 training images make no batch of 9" in refused(*few, "--out", out)
    found = load(None, kept, image_size=8, train_limit=8, test_limit=4)
    assert found.train.shape == (8, 3, 8, 8) and found.test.shape == (4, 3, 8, 8)
    assert found.train_labels.bincount().tolist() == [4, 4] and found.classes == ("cat", "dog")


def fabricated(finals: dict[tuple[float | None, int], list[float]]) -> dict[Run, Progress]:
    return {
        one("resnet18-sgd", lambda_, epochs, seed): Progress(
            [0.5] * (epochs - 1) + [final], [1.0] * epochs, [1.0] * epochs, ["cpu"], "…"
        )
        for (lambda_, epochs), of_seeds in finals.items()
        for seed, final in enumerate(of_seeds)
    }


def test_findings_say_no_more_than_the_seeds_show() -> None:
    plain = [0.90, 0.91, 0.92]
    same = fabricated({(None, 4): plain, (0.1, 2): [0.91, 0.90, 0.925]})
    (said,) = findings(same)
    assert said.startswith("TrAct, λ = 0.1, 2 epochs, against plain, 4 epochs: +0.17 points")
    # Mean 1/6, standard error 0.601, Student's 4.30 for two degrees of freedom.
    assert "(higher in 2, lower in 1); 95 % interval -2.42 to +2.75, no difference" in said
    assert said.endswith("It trained for 0.50 times as long, at another time.")
    better = fabricated({(None, 4): plain, (0.1, 2): [a + 0.01 for a in plain]})
    assert "95 % interval +1.00 to +1.00, so they differ." in findings(better)[0]
    single = fabricated({(None, 4): plain, (0.1, 2): [0.95]})
    assert "One seed can't tell this from chance." in findings(single)[0]
    assert findings(fabricated({(None, 4): plain})) == []
    short = findings(fabricated({(None, 4): plain, (0.1, 4): plain, (None, 2): plain}))
    assert [sentence.partition(", against")[0] for sentence in short] == [
        "plain, 2 epochs",
        "TrAct, λ = 0.1, 4 epochs",
    ]
    assert findings(fabricated({(0.1, 2): plain})) == []


def test_table_counts_the_epochs_to_the_plain_final() -> None:
    results = fabricated({(None, 4): [0.9, 0.9, 0.9], (0.1, 2): [0.95, 0.8, 0.95]})
    console = Console(width=100, record=True, quiet=True)
    with console.capture() as captured:
        console.quiet = False
        console.print(table("resnet18-sgd", results))
    plain, tract = (line.split() for line in captured.get().splitlines()[-3:-1])
    assert plain == "plain, 4 epochs 3 90.00 ± 0.00 4 1.00".split()
    assert tract == "TrAct, λ = 0.1, 2 epochs 3 90.00 ± 8.66 2 (1 of 3 never) 1.00".split()


def test_budget_begins_nothing_that_would_end_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    budget, endless = Budget(110.0), Budget(None)
    assert budget.allows(("epoch", "vit-adam"))  # how long one takes is not known yet
    with budget.measured(("epoch", "vit-adam")):
        now += 4
    assert budget.allows(("epoch", "vit-adam")) and budget.allows(("start", "vit-adam"))
    now += 2
    assert not budget.allows(("epoch", "vit-adam")) and budget.allows(("start", "vit-adam"))
    now += 4
    assert not budget.allows(("start", "vit-adam"))
    assert endless.allows(("epoch", "vit-adam"))
