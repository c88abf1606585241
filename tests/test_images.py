"""Images: batches against a slow loop over images, decoding against PIL, splits, sources in their order, bad input."""

import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from grape_hf import hub
from grape_hf.vision import sources
from grape_hf.vision.data import EpochDraws, Images, Stopwatch, mean_and_std
from grape_hf.vision.sources import EMBEDDED, ImageData, load_images

DATA = Path(__file__).parents[2] / "shared" / "data"
MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.2, 0.3]


def some_images(n: int = 23, height: int = 9, width: int = 7, **options: object) -> Images:
    pixels = torch.randint(256, (n, 3, height, width), dtype=torch.uint8)
    return Images(pixels, torch.arange(n), MEAN, STD, **options)  # type: ignore[arg-type]


def one_by_one(images: Images, epoch: int, index: int) -> np.ndarray:
    """The definition, for one image: draws in the documented order, pad, crop, mirror, normalise."""
    draws = np.random.default_rng((images.seed, epoch))
    shifts = draws.integers(2 * images.padding + 1, size=(2, len(images))) if images.padding else None
    mirrored = draws.random(len(images)) < 0.5 if images.flip else None
    image = images.pixels[index].numpy()
    height, width = image.shape[1:]
    if shifts is not None:
        image = np.pad(image, ((0, 0), *[(images.padding, images.padding)] * 2))
        down, right = shifts[:, index]
        image = image[:, down : down + height, right : right + width]
    if mirrored is not None and mirrored[index]:
        image = image[:, :, ::-1]
    return (image / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))


class TestBatches:
    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize(("padding", "flip"), [(0, False), (2, False), (0, True), (3, True)])
    def test_they_are_the_slow_loop(self, padding: int, flip: bool, channels_last: bool):
        images = some_images(padding=padding, flip=flip, seed=5, channels_last=channels_last)
        chosen = [3, 22, 0, 7, 7]
        for epoch in (0, 4):
            images.set_epoch(epoch)
            batch = images.__getitems__(chosen)
            expected = np.stack([one_by_one(images, epoch, i) for i in chosen])
            np.testing.assert_allclose(batch["pixel_values"], expected, rtol=1e-5, atol=1e-6)
            assert batch["pixel_values"].dtype == torch.float32
            layout = torch.channels_last if channels_last else torch.contiguous_format
            assert batch["pixel_values"].is_contiguous(memory_format=layout)
            assert batch["labels"].tolist() == chosen

    def test_the_draws_vary_with_epoch_and_seed_and_nothing_else(self):
        def batch(images: Images, epoch: int) -> torch.Tensor:
            images.set_epoch(epoch)
            return images.__getitems__(range(23))["pixel_values"]

        images = some_images(padding=2, flip=True)
        first = batch(images, 1)
        assert not torch.equal(batch(images, 2), first)
        torch.manual_seed(99)
        assert torch.equal(batch(images, 1), first)
        other = Images(images.pixels, images.labels, MEAN, STD, padding=2, flip=True, seed=1)
        assert not torch.equal(batch(other, 1), first)

    def test_a_batch_does_not_depend_on_how_the_epoch_is_cut_or_where_it_begins(self):
        images = some_images(padding=2, flip=True)
        whole = images.__getitems__(range(23))["pixel_values"]
        parts = [images.__getitems__(range(i, min(i + 4, 23)))["pixel_values"] for i in range(8, 23, 4)]
        assert torch.equal(torch.cat(parts), whole[8:])
        assert torch.equal(images[11]["pixel_values"], whole[11])

    def test_crops_and_mirrors_are_evenly_drawn(self):
        n, padding = 20_000, 1
        images = Images(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.zeros(n).long(), [0], [1], padding, True)
        counts = torch.bincount(images._down * 3 + images._right, minlength=9)
        # 9 places of n/9 each, binomial: 4.5 standard deviations, so that one in some 15,000 seeds would fail.
        assert (counts - n / 9).abs().max() < 4.5 * math.sqrt(n * 8 / 81)
        assert abs(int(images._mirrored.sum()) - n / 2) < 4.5 * math.sqrt(n / 4)

    def test_a_loader_gets_whole_batches(self):
        images = some_images()
        loader = DataLoader(images, batch_size=10, collate_fn=Images.collate)
        assert [len(batch["labels"]) for batch in loader] == [10, 10, 3]

    def test_mean_and_std(self):
        pixels = torch.randint(256, (11, 3, 5, 4), dtype=torch.uint8)
        pixels[:, 2] = 51
        means, stds = mean_and_std(pixels)
        values = pixels.double() / 255
        np.testing.assert_allclose(means, values.mean(dim=(0, 2, 3)), rtol=1e-12)
        np.testing.assert_allclose(stds[:2], values.std(dim=(0, 2, 3), correction=0)[:2], rtol=1e-12)
        assert stds[2] == 1.0

    def test_shapes_that_are_refused(self):
        with pytest.raises(ValueError, match=r"Expected pixels .* got \(4, 3, 2\) in torch.uint8 and \(4,\)"):
            Images(torch.zeros(4, 3, 2, dtype=torch.uint8), torch.zeros(4), [0], [1])

    def test_the_stopwatch_adds_up(self):
        watch = Stopwatch(torch.device("cpu"))
        assert watch.seconds() == 0
        with watch:
            torch.randn(200, 200) @ torch.randn(200, 200)
        once = watch.seconds()
        with watch:
            pass
        assert 0 < once <= watch.seconds()


class Recorder(Images):
    """Remembers what it gave."""

    def __getitems__(self, indices):  # type: ignore[no-untyped-def]
        batch = super().__getitems__(indices)
        self.given = [*getattr(self, "given", []), (list(indices), batch["pixel_values"])]
        return batch


def train(images: Images, folder: Path, resume: str | None = None, **options: object) -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=8, patch_size=4
    )
    arguments = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 4, "per_device_train_batch_size": 8}
    trainer = Trainer(
        model=ViTForImageClassification(config),
        args=TrainingArguments(
            str(folder),
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **arguments | options,  # type: ignore[arg-type]
        ),
        train_dataset=images,
        data_collator=Images.collate,
        callbacks=[EpochDraws(images)],
    )
    trainer.train(resume_from_checkpoint=resume)


def test_the_trainer_begins_each_epoch_with_new_draws_and_a_resumed_run_sees_the_same_images(tmp_path: Path):
    """3 epochs of 3 batches, resumed in the middle of the second."""

    def images() -> Recorder:
        generator = torch.Generator().manual_seed(1)
        pixels = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8, generator=generator)
        return Recorder(pixels, torch.zeros(20).long(), MEAN, STD, padding=2, flip=True)

    through, resumed = images(), images()
    train(through, tmp_path)
    assert [len(indices) for indices, _ in through.given] == [8, 8, 4] * 3
    for step, (indices, pixels) in enumerate(through.given):
        for i, image in zip(indices, pixels, strict=True):
            np.testing.assert_allclose(image, one_by_one(through, step // 3, i), rtol=1e-5, atol=1e-6)
    train(resumed, tmp_path, resume=str(tmp_path / "checkpoint-4"))
    rest = through.given[-len(resumed.given) :]
    assert len(rest) == 5
    for (indices, pixels), (expected_indices, expected) in zip(resumed.given, rest, strict=True):
        assert indices == expected_indices
        assert torch.equal(pixels, expected)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def write_folder(folder: Path, splits: dict[str, int], sizes: tuple[tuple[int, int], ...] = ((6, 5),)) -> Path:
    """Parquet files with colour images of these sizes (width, height) in turn, of three classes, and other columns."""
    draws = np.random.default_rng(0)
    features = Features({"picture": ImageFeature(), "kind": ClassLabel(names=["a", "b", "c"]), "word": Value("string")})
    for split, n in splits.items():
        shapes = [(*sizes[i % len(sizes)][::-1], 3) for i in range(n)]
        pictures = [Image.fromarray(draws.integers(256, size=shape, dtype=np.uint8)) for shape in shapes]
        rows = {
            "picture": pictures,
            "kind": [i % 3 for i in range(n)],
            "word": ["yes" if i % 2 else "no" for i in range(n)],
        }
        folder.mkdir(exist_ok=True)
        Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
    return folder


def contents(data: ImageData) -> dict[str, set[bytes]]:
    return {name: {image.numpy().tobytes() for image in getattr(data, name).pixels} for name in ("train", "validation")}


class TestSplits:
    def test_they_are_disjoint_and_the_subset_grows_out_of_itself(self, tmp_path: Path, cache: Path):
        folder = str(write_folder(tmp_path / "images", {"train": 100}))
        whole, third, more = (contents(load_images(folder, train_subset=share)) for share in (None, 0.3, 0.6))
        assert {name: len(images) for name, images in whole.items()} == {"train": 90, "validation": 10}
        assert not whole["train"] & whole["validation"]
        assert third["validation"] == more["validation"] == whole["validation"]
        assert third["train"] < more["train"] < whole["train"]
        assert (len(third["train"]), len(more["train"])) == (30, 60)

    def test_the_seed_of_the_training_does_not_matter_but_that_of_the_split_does(self, tmp_path: Path, cache: Path):
        folder = str(write_folder(tmp_path / "images", {"train": 100}))
        first = contents(load_images(folder, train_subset=0.3))
        torch.manual_seed(77)
        np.random.seed(77)  # noqa: NPY002
        assert contents(load_images(folder, train_subset=0.3)) == first
        assert contents(load_images(folder, train_subset=0.3, data_seed=1)) != first

    def test_labels_stay_with_their_images(self, tmp_path: Path, cache: Path):
        folder = write_folder(tmp_path / "images", {"train": 50})
        rows = load_dataset(str(folder), split="train")
        labels = {np.asarray(row["picture"]).tobytes(): row["kind"] for row in rows}
        data = load_images(str(folder))
        for pixels, label in zip(data.train.pixels, data.train.labels, strict=True):
            assert labels[pixels.permute(1, 2, 0).contiguous().numpy().tobytes()] == label

    def test_a_validation_split_of_the_data_is_used(self, tmp_path: Path, cache: Path):
        data = load_images(str(write_folder(tmp_path / "images", {"train": 20, "validation": 6})))
        assert (len(data.train), len(data.validation), data.test) == (20, 6, None)

    def test_the_test_split_is_read_when_asked_for(self, tmp_path: Path, cache: Path):
        folder = str(write_folder(tmp_path / "images", {"train": 20, "test": 7}))
        assert load_images(folder).test is None
        test = load_images(folder, with_test=True).test
        assert test is not None
        assert len(test) == 7
        assert len(list((cache / "grape_hf").iterdir())) == 2

    @pytest.mark.parametrize("shares", [{"train_subset": 0.95}, {"validation_fraction": 0.0}, {"train_subset": 1e-4}])
    def test_shares_that_do_not_fit(self, shares: dict[str, float]):
        with pytest.raises(ValueError, match="has 1,437 images for training, of which .* are held out"):
            load_images(dataset_name=EMBEDDED, **shares)  # type: ignore[arg-type]

    def test_shares_out_of_range(self):
        with pytest.raises(ValueError, match="train_subset=20: expected shares between 0 and 1"):
            load_images(dataset_name=EMBEDDED, train_subset=20)


class TestDecoding:
    def test_it_is_pils(self, tmp_path: Path, cache: Path):
        folder = write_folder(tmp_path / "images", {"train": 12, "validation": 3})
        rows = load_dataset(str(folder), split="train")
        colour, grey = (load_images(str(folder), channels=c).train for c in (None, 1))
        expected = {np.asarray(row["picture"]).transpose(2, 0, 1).tobytes() for row in rows}
        assert colour.pixels.shape == (12, 3, 5, 6)
        assert {pixels.numpy().tobytes() for pixels in colour.pixels} == expected
        expected = {np.asarray(row["picture"].convert("L")).tobytes() for row in rows}
        assert {pixels.numpy().tobytes() for pixels in grey.pixels} == expected

    def test_a_second_time_comes_from_the_cache(self, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
        folder = str(write_folder(tmp_path / "images", {"train": 30}))
        first = load_images(folder)
        monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded again"))
        second = load_images(folder)
        assert torch.equal(first.train.pixels, second.train.pixels)
        assert [path.suffix for path in (cache / "grape_hf").iterdir()] == [".npy"]

    def test_images_of_several_sizes(self, tmp_path: Path, cache: Path):
        folder = str(write_folder(tmp_path / "images", {"train": 30}, sizes=((6, 5), (8, 5))))
        with pytest.raises(
            ValueError, match=r"expected images of one size, found 6 x 5 and 8 x 5 \(row 1\). Set image_"
        ):
            load_images(folder)
        assert load_images(folder, image_size=4).train.pixels.shape[1:] == (3, 4, 4)

    def test_more_than_the_limit(self, tmp_path: Path, cache: Path):
        folder = str(write_folder(tmp_path / "images", {"train": 30}))
        with pytest.raises(ValueError, match=r"decodes to 13.7 GiB \(30 images of 3 x 12800 x 12800\).* at most 8 GiB"):
            load_images(folder, image_size=12800)

    @pytest.mark.parametrize(
        ("name", "grey", "shape"), [("cifar100", False, (3, 32, 32)), ("mnist", True, (1, 28, 28))]
    )
    def test_real_files(self, name: str, grey: bool, shape: tuple[int, ...], tmp_path: Path):
        if not (DATA / name).is_dir():
            pytest.skip(f"{DATA / name} is not here: it holds a copy of the data set")
        rows = load_dataset(str(DATA / name), split="test").select(range(50))
        rows.to_parquet(str(tmp_path / "train.parquet"))
        data = load_images(str(tmp_path))
        column = "image" if grey else "img"
        expected = {np.asarray(row[column]).reshape(*shape[1:], -1).transpose(2, 0, 1).tobytes() for row in rows}
        assert data.train.pixels.shape == (45, *shape)
        assert {pixels.numpy().tobytes() for pixels in data.train.pixels} < expected
        assert len(data.label_names) == (10 if grey else 100)


class TestSources:
    def test_the_embedded_sample(self):
        data = load_images(dataset_name=EMBEDDED, with_test=True)
        assert data.name == "embedded sample (scikit-learn's digits, 8 x 8)"
        assert (len(data.train), len(data.validation), len(data.test or [])) == (1293, 144, 360)
        assert data.train.pixels.shape[1:] == (1, 8, 8)
        assert (int(data.train.pixels.min()), int(data.train.pixels.max())) == (0, 255)
        assert data.test is not None
        counts = torch.bincount(data.test.labels)
        assert counts.min() >= 34  # a fifth of each class; the rarest has 174 images
        assert counts.max() <= 37

    def test_without_the_hub_it_says_that_this_is_not_cifar(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ):
        monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
        assert load_images().name.startswith("embedded sample")
        assert "This is NOT CIFAR-100. The Hub is not in reach (HF_HUB_OFFLINE is set)" in caplog.text

    def test_what_is_asked_for_is_an_error(self, caplog: pytest.LogCaptureFixture):
        with pytest.raises(ValueError, match="'some/set' cannot be loaded"):
            load_images(dataset_name="some/set")
        with pytest.raises(FileNotFoundError, match="data_dir='/no/such': expected a folder .* found nothing there"):
            load_images("/no/such")
        with pytest.raises(ValueError, match="one source of images, got both"):
            load_images("/no/such", dataset_name="some/set")
        assert "embedded" not in caplog.text

    def test_columns_by_type_and_by_name(self, tmp_path: Path, cache: Path):
        folder = str(write_folder(tmp_path / "images", {"train": 30}))
        assert load_images(folder).label_names == ["a", "b", "c"]
        data = load_images(folder, label_column="word")
        assert data.label_names == ["no", "yes"]
        assert set(data.train.labels.tolist()) == {0, 1}

    def test_columns_that_are_not_clear(self, tmp_path: Path, cache: Path):
        folder = write_folder(tmp_path / "images", {"train": 30})
        with pytest.raises(ValueError, match="no column 'none', only picture, kind, word. Set image_column"):
            load_images(str(folder), image_column="none")
        with pytest.raises(ValueError, match="expected images in column 'word', got Value.* Set image_column"):
            load_images(str(folder), image_column="word")
        rows = load_dataset(str(folder), split="train")
        rows.add_column("other", rows["kind"], feature=ClassLabel(names=["x", "y", "z"])).to_parquet(
            str(folder / "train.parquet")
        )
        with pytest.raises(ValueError, match="one column of type ClassLabel, found kind, other among .* Set label_col"):
            load_images(str(folder))

    def test_a_folder_of_images(self, tmp_path: Path, cache: Path):
        for i, kind in enumerate(("cat", "dog")):
            (tmp_path / "images" / kind).mkdir(parents=True)
            for j in range(10):
                Image.new("RGB", (4, 4), (i * 100, j, 0)).save(tmp_path / "images" / kind / f"{j}.png")
        data = load_images(str(tmp_path / "images"))
        assert data.label_names == ["cat", "dog"]
        assert [int(pixels[0, 0, 0]) // 100 for pixels in data.train.pixels] == data.train.labels.tolist()

    def test_no_training_split(self, tmp_path: Path, cache: Path):
        folder = str(write_folder(tmp_path / "images", {"train": 30}))
        with pytest.raises(ValueError, match="has no split 'test', only train"):
            load_images(folder, with_test=True)


def test_the_hub_is_asked_for_cifar(monkeypatch: pytest.MonkeyPatch):
    assert sources.CIFAR100 == ("uoft-cs/cifar100", "fine_label")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    assert hub.why_out_of_reach("any/thing", 1) == "HF_HUB_OFFLINE is set"
