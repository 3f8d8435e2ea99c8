import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import moco
from moco.config import DataConfig, parse_config
from moco.data import ArrayImages, Splits, load_data
from moco.evaluate import held_out
from moco.evaluate.contract import ROWS_AT_ONCE, accuracies, balanced, check_finite
from moco.evaluate.knn import few_label_accuracy, knn_scores
from moco.method.backbones import build_backbone
from moco.method.encoder import ImageEncoder
from moco.storage.encoder_files import save_encoder

CLASSES = 7


def random_set(n: int, *, seed: int, dim: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of any length around a direction for each class, near enough for some to be mistaken."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, dim, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (n,), generator=g)
    vectors = centres[labels] + 1.5 * torch.randn(n, dim, generator=g, dtype=torch.float64)
    return vectors * (0.1 + 5 * torch.rand(n, 1, generator=g, dtype=torch.float64)), labels


def scores_by_loop(bank, bank_labels, queries, k, temperature):
    """Equation by equation: the k most similar vote for their class with exp(cosine / temperature)."""
    scores = np.zeros((len(queries), CLASSES))
    for row, query in enumerate(queries.tolist()):
        similar = []
        for vector, label in zip(bank.tolist(), bank_labels.tolist(), strict=True):
            cosine = sum(a * b for a, b in zip(query, vector, strict=True)) / math.hypot(*query) / math.hypot(*vector)
            similar.append((cosine, label))
        for cosine, label in sorted(similar, reverse=True)[:k]:
            scores[row, label] += math.exp(cosine / temperature)
    return scores


def embeddings(vectors: torch.Tensor, labels: torch.Tensor | None) -> moco.Embeddings:
    return moco.Embeddings(
        vectors=vectors.float().numpy(),
        paths=tuple(map(str, range(len(vectors)))),
        labels=None if labels is None else labels.numpy(),
        classes=None if labels is None else tuple("abcdefg"),
    )


@pytest.mark.parametrize("k, temperature", [(1, 0.1), (5, 0.1), (20, 0.5), (90, 0.07), (1000, 0.1)])
def test_scores_are_the_published_sum_over_the_nearest(k, temperature):
    bank, labels = random_set(90, seed=0)
    queries, _ = random_set(40, seed=1)
    got = knn_scores(bank, labels, queries, k=k, temperature=temperature)
    # Divided by exp(1 / temperature), which changes no ranking and cannot overflow.
    want = scores_by_loop(bank, labels, queries, k, temperature) * math.exp(-1 / temperature)
    torch.testing.assert_close(got, torch.from_numpy(want), rtol=1e-9, atol=1e-15)


def test_top1_and_top5_count_the_best_and_the_five_best_classes():
    bank, labels = random_set(300, seed=0)
    queries, wanted = random_set(200, seed=1)
    ranked = np.argsort(
        -scores_by_loop(bank, labels, queries, 200, 0.1), axis=1
    )  # many voters: no class is left without
    hits = ranked == wanted.numpy()[:, None]
    got = moco.knn(embeddings(bank, labels), embeddings(queries, wanted), k=200, temperature=0.1)
    assert got == {
        "top1": pytest.approx(100 * hits[:, 0].mean()),
        "top5": pytest.approx(100 * hits[:, :5].any(1).mean()),
    }
    assert 30 < got["top1"] < got["top5"] < 100


def test_more_voters_than_images_are_all_images():
    bank, labels = random_set(30, seed=0)
    queries, wanted = random_set(20, seed=1)
    every = moco.knn(embeddings(bank, labels), embeddings(queries, wanted), k=30)
    assert moco.knn(embeddings(bank, labels), embeddings(queries, wanted), k=200) == every


def test_with_fewer_than_five_classes_top5_is_everything_that_can_be_right():
    bank, labels = torch.eye(3), torch.arange(3)
    scores = knn_scores(bank, labels, torch.eye(3), k=3, temperature=0.1)
    got = accuracies(scores, torch.tensor([0, 1, 1]))
    assert got == {"top1": pytest.approx(200 / 3), "top5": 100.0}


def test_a_class_without_training_images_is_never_right():
    scores = knn_scores(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), k=1, temperature=0.1)
    got = accuracies(scores, torch.tensor([0, 5]))
    assert got == {"top1": 50.0, "top5": 50.0}


@pytest.mark.parametrize("at_once", [1, 200, 90 * 7])
def test_working_in_parts_changes_nothing(at_once, monkeypatch):
    bank, labels = random_set(90, seed=0)
    queries, _ = random_set(40, seed=1)
    whole = knn_scores(bank, labels, queries, k=20, temperature=0.1)
    # By its module: the path `moco.evaluate` is the function.
    monkeypatch.setattr(sys.modules[knn_scores.__module__], "QUERIES_AT_ONCE", at_once)
    torch.testing.assert_close(knn_scores(bank, labels, queries, k=20, temperature=0.1), whole, rtol=1e-12, atol=0)


def test_a_low_temperature_does_not_overflow():
    bank, labels = random_set(90, seed=0)
    scores = knn_scores(bank.float(), labels, bank.float(), k=20, temperature=0.005)
    assert scores.isfinite().all() and (scores.argmax(dim=1) == labels).all()


def test_knn_without_labels_says_which_part_lacks_them():
    vectors, labels = random_set(20, seed=0)
    good, bad = embeddings(vectors, labels), embeddings(vectors, None)
    for train, test, part in ((bad, good, "train"), (good, bad, "test")):
        with pytest.raises(ValueError, match=f"the {part} images have no labels; kNN needs"):
            moco.knn(train, test)


def opposites(n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Class 0 lies at (1, 0). Half of class 1 lies at (0, 1), the other half opposite."""
    bank = torch.tensor([[1.0, 0.0]]).repeat(2 * n, 1)
    bank[n:] = torch.tensor([0.0, 1.0])
    bank[n + n // 2 :] *= -1
    return bank, torch.arange(2).repeat_interleave(n)


def test_accuracy_with_few_labels_is_known_for_a_set_made_for_it():
    bank, labels = opposites()
    queries, wanted = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.arange(2)

    def accuracy(number: int, draws: int = 100) -> float:
        return few_label_accuracy(bank, labels, queries, wanted, labels_per_class=number, num_draws=draws)

    # The query of class 1 is right if an image of its half is labelled: one draw in two with one label, and with three
    # 1 - (20 * 19 * 18) / (40 * 39 * 38).
    assert accuracy(1, 400) == pytest.approx(50 + 50 / 2, abs=4 * 50 * math.sqrt(0.25 / 400))
    assert accuracy(3, 400) == pytest.approx(50 + 50 * 0.8846, abs=4 * 50 * math.sqrt(0.102 / 400))
    assert accuracy(21) == accuracy(40) == 100


def test_accuracy_with_few_labels_draws_the_same_images_each_time_and_leaves_the_generator_alone():
    bank, labels = random_set(120, seed=0)
    queries, wanted = random_set(60, seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = torch.get_rng_state()
        first = few_label_accuracy(bank, labels, queries, wanted, labels_per_class=2, num_draws=5)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(1)
        assert few_label_accuracy(bank, labels, queries, wanted, labels_per_class=2, num_draws=5) == first
    assert few_label_accuracy(bank, labels, queries, wanted, labels_per_class=2, num_draws=6) != first


def test_accuracy_with_few_labels_needs_that_many_of_each_class():
    bank, labels = opposites(n=4)
    with pytest.raises(ValueError, match="a class has 4 training images; expected at least 5 to label"):
        few_label_accuracy(bank, labels, bank, labels, labels_per_class=5)


def array_images(n: int, *, labelled: bool = True) -> ArrayImages:
    return ArrayImages(
        images=torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 2, 2).contiguous(),
        labels=torch.arange(n) % 2 if labelled else None,
        classes=("a", "b") if labelled else None,
        paths=tuple(map(str, range(n))),
    )


def test_every_tenth_image_is_held_out_where_there_is_no_test_part():
    train, test = array_images(45), array_images(3)
    assert held_out(Splits(train, test)) == (train, test)
    for splits in (held_out(Splits(train, None)), held_out(Splits(train, test), use_test=False)):
        assert splits.test is not None
        assert splits.test.paths == ("0", "10", "20", "30", "40")
        assert len(splits.train) == 40 and not set(splits.train.paths) & set(splits.test.paths)


def test_holding_out_needs_labels_and_enough_images():
    with pytest.raises(ValueError, match="no labels, which this protocol needs"):
        held_out(Splits(array_images(45, labelled=False), None))
    with pytest.raises(ValueError, match="19 labelled images are too few .* at least 20"):
        held_out(Splits(array_images(19), None))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with an untrained encoder."""
    config = parse_config({"data": {"source": "digits"}, "monitor": {"knn_k": 9, "knn_temperature": 0.2}})
    made = moco.Run.create(tmp_path_factory.mktemp("runs") / "first", config)
    torch.manual_seed(0)
    backbone = build_backbone("resnet-tiny", stem="small")
    half = (0.5, 0.5, 0.5)
    save_encoder(
        made.path,
        ImageEncoder(backbone, name="resnet-tiny", stem="small", channels=3, mean=half, std=half, input_size=8),
    )
    return made


def test_knn_by_default_uses_the_settings_of_the_run(run):
    got = moco.evaluate(run.path).figures
    assert got == moco.evaluate(str(run.path), "knn", data="digits", settings={"k": 9, "temperature": 0.2}).figures
    assert got != moco.evaluate(run.path, settings={"k": 100, "temperature": 1.0}).figures


def test_evaluating_by_knn_is_knn_of_the_embedded_splits(run):
    encoder = moco.load_encoder(run.path)
    train, test = (moco.embed(encoder, part) for part in load_data(DataConfig(source="digits")) if part)
    want = moco.knn(train, test, k=9, temperature=0.2)
    assert moco.evaluate(run.path).figures == pytest.approx(want)
    assert want["top1"] > 80  # of an untrained network


def test_a_bank_read_in_blocks_gives_the_same_neighbours(monkeypatch):
    bank, labels = random_set(301, seed=0)
    queries, _ = random_set(40, seed=1)
    whole = knn_scores(bank, labels, queries, k=25, temperature=0.1)
    module = sys.modules["moco.evaluate.knn"]
    monkeypatch.setattr(module, "QUERIES_AT_ONCE", 7)
    monkeypatch.setattr(module, "NUMBERS_AT_ONCE", 7 * 16)  # blocks of 16 rows, fewer than k
    torch.testing.assert_close(knn_scores(bank, labels, queries, k=25, temperature=0.1), whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        knn_scores(bank.numpy(), labels, queries, k=25, temperature=0.1), whole, rtol=1e-12, atol=0
    )


def test_a_mapped_bank_is_never_in_memory_as_a_whole(tmp_path):
    """256 MiB of vectors in a file that must not be written to, in blocks of 16 MiB."""
    check = """
import sys, threading, time
import numpy as np
import moco
import moco.evaluate
module = sys.modules["moco.evaluate.knn"]
module.NUMBERS_AT_ONCE = 2**22
rows, width, most, done = 2**16, 1024, 0, False
bank = np.memmap(sys.argv[1], np.float32, "w+", shape=(rows, width))
for start in range(0, rows, 8192):
    bank[start : start + 8192] = np.random.default_rng(start).random((8192, width), np.float32)
bank = np.memmap(sys.argv[1], np.float32, "r", shape=(rows, width))
few = np.array(bank[-64:])
labels, names = np.arange(rows) % 10, tuple(map(str, range(rows)))

def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) / 1024

def watch():
    global most
    while not done:
        most = max(most, anonymous())
        time.sleep(0.002)

own = moco.Embeddings(few, names[-64:], labels[-64:], None)
moco.knn(own, own, k=1)  # what libraries set up at their first use is not the bank
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
got = moco.knn(moco.Embeddings(bank, names, labels, None), own, k=1)
done = True
watcher.join()
assert got["top1"] == 100.0, got
print(most - before)
"""
    command = [sys.executable, "-c", check, str(tmp_path / "bank")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 100, done.stdout


def test_an_evaluation_is_written_into_the_run(run):
    found = moco.evaluate(run.path, "knn", settings={"labels": 0.1})
    folder = run.path / "evaluations"
    assert found.name == "knn-labels10" and found.folder == folder
    record = json.loads((folder / "knn-labels10.json").read_text())
    assert record["figures"] == found.figures and record["settings"]["labels"] == 0.1 and record["data"] == "digits"
    matrix = np.array(record["confusion"])
    test = load_data(DataConfig(source="digits")).test
    assert test is not None and matrix.sum() == len(test)
    assert 100 * matrix.trace() / matrix.sum() == pytest.approx(found.figures["top1"])
    assert found.per_class["7"] == pytest.approx(100 * matrix[7, 7] / matrix[7].sum())
    with Image.open(folder / "knn-labels10.png") as picture:
        picture.load()


def test_of_a_tenth_of_the_labels_each_class_has_as_many_and_more_contain_fewer():
    labels = load_data(DataConfig(source="digits")).train.labels
    assert labels is not None
    tenth, half = (balanced(labels, fraction, seed=3) for fraction in (0.1, 0.5))
    assert torch.bincount(labels[tenth]).tolist() == [14] * 10
    assert set(tenth.tolist()) < set(half.tolist()) and tenth.equal(tenth.sort().values)
    assert not tenth.equal(balanced(labels, 0.1, seed=4))


def test_an_unknown_protocol_names_the_known_ones_and_the_closest(run):
    with pytest.raises(ValueError, match="unknown protocol 'kn': expected one of knn.*; did you mean knn"):
        moco.evaluate(run.path, "kn")


@pytest.mark.parametrize("kind", [torch.from_numpy, np.asarray])
def test_features_that_are_no_numbers_are_found_in_whichever_block_they_are(kind):
    vectors = np.zeros((2 * ROWS_AT_ONCE + 3, 2), dtype=np.float32)
    check_finite(kind(vectors), "training")
    vectors[-1, 1] = np.nan
    with pytest.raises(ValueError, match="^some training features are NaN or infinite; the encoder may be damaged"):
        check_finite(kind(vectors), "training")
