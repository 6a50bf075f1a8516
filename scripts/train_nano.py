"""Train the embedded checkpoint, van_nano, on CIFAR-10 and write it in the official file format.

    python scripts/train_nano.py --data cifar10.tar.gz --out van_nano.pth.tar

The archive contains `train/CLASS/*.jpg` and `test/CLASS/*.jpg`. The recipe is the paper's (arXiv 2202.09741, section
4.1) where it makes sense at this size: AdamW, cosine schedule with warm-up, label smoothing, random crop and flip,
mixup, CutMix, random erasing and drop path. The image size grows from 32 to 64 during training, which halves the cost.
The script writes the weights of the last epoch, so the test images influence no choice.
"""

from __future__ import annotations

import io
import tarfile
import time
from pathlib import Path
from types import MethodType
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import track
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from porting.references.van import LKA, VAN, VARIANTS

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_SIZE = 64


def read_cifar(archive: Path, split: str) -> tuple[Tensor, Tensor]:
    """Read images, `(N, 3, 32, 32)` uint8, and labels, `(N,)`, sorted by their names in the archive."""
    rows: list[tuple[str, np.ndarray]] = []
    with tarfile.open(archive) as tar:
        for member in track(tar, description=f"reading {split}", total=60_000, transient=True):
            parts = Path(member.name).parts
            if member.isfile() and split in parts and parts[-2] in CLASSES:
                handle = tar.extractfile(member)
                assert handle is not None  # true after isfile()
                pixels = np.asarray(Image.open(io.BytesIO(handle.read())).convert("RGB"))
                rows.append(("/".join(parts[-2:]), pixels))
    rows.sort(key=lambda row: row[0])
    labels = [CLASSES.index(name.split("/")[0]) for name, _ in rows]
    return torch.from_numpy(np.stack([p for _, p in rows])).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def enlarge(images: Tensor, size: int) -> Tensor:
    """Convert uint8 images to floats in [-1, 1], enlarged with bicubic interpolation as in PIL."""
    x = images.float()
    if size != x.shape[-1]:
        x = F.interpolate(x, size=(size, size), mode="bicubic", antialias=True).round_().clamp_(0, 255)
    return (x / 127.5 - 1.0).contiguous(memory_format=torch.channels_last)


def crop_and_flip(images: Tensor, padding: int = 4) -> Tensor:
    """Shift each image by up to `padding` pixels, with a reflected border, and mirror it with probability 0.5."""
    n, _, height, width = images.shape
    padded = F.pad(images.float(), (padding,) * 4, mode="reflect").to(torch.uint8)
    top, left = torch.randint(0, 2 * padding + 1, (2, n))
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    mirrored = torch.rand(n) < 0.5
    columns[mirrored] = columns[mirrored].flip(1)
    batch = torch.arange(n)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def dilated_by_phases(self: nn.Conv2d, x: Tensor) -> Tensor:
    """Compute a dilated depthwise convolution as nine plain ones, one per phase of the dilation.

    The result equals that of the original convolution. Its gradient is three times as fast on a CPU, where dilated
    kernels have no fast backward pass. Taps that can see only padding are removed.
    """
    n, channels, height, width = x.shape
    step = self.dilation[0]
    padded = F.pad(x, (0, -width % step, 0, -height % step))
    rows, columns = padded.shape[2] // step, padded.shape[3] // step
    phases = padded.view(n, channels, rows, step, columns, step).permute(0, 3, 5, 1, 2, 4)
    phases = phases.reshape(n * step * step, channels, rows, columns).contiguous(memory_format=torch.channels_last)
    middle = self.kernel_size[0] // 2
    reach = min(middle, max(rows, columns) - 1)
    taps = slice(middle - reach, middle + reach + 1)
    y = F.conv2d(phases, self.weight[:, :, taps, taps], self.bias, padding=reach, groups=channels)
    y = y.view(n, step, step, channels, rows, columns).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(n, channels, rows * step, columns * step)[:, :, :height, :width]


@torch.inference_mode()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, size: int) -> float:
    """The top-1 accuracy, from 0 to 1."""
    model.eval()
    hits = 0
    for start in range(0, len(labels), 250):
        chosen = slice(start, start + 250)
        hits += int((model(enlarge(images[chosen], size)).argmax(1) == labels[chosen]).sum().item())
    return hits / len(labels)


def save(contents: dict[str, Any], path: Path) -> None:
    temporary = path.with_name(path.name + ".part")
    torch.save(contents, temporary)
    temporary.replace(path)


@click.command(help=__doc__)
@click.option("--data", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option(
    "--epochs", type=(int, int, int), default=(20, 14, 8), show_default=True, help="Epochs at 32, 48 and 64 pixels."
)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--lr", default=2e-3, show_default=True)
@click.option("--weight-decay", default=0.05, show_default=True)
@click.option("--drop-path-rate", default=0.05, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    data: Path,
    out: Path,
    epochs: tuple[int, int, int],
    batch_size: int,
    lr: float,
    weight_decay: float,
    drop_path_rate: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # timm's Mixup draws from NumPy's global generator
    images, labels = read_cifar(data, "train")
    test_images, test_labels = read_cifar(data, "test")
    sizes = [32] * epochs[0] + [48] * epochs[1] + [IMAGE_SIZE] * epochs[2]

    model = VAN(**VARIANTS["nano"]._asdict(), num_classes=len(CLASSES), drop_path_rate=drop_path_rate)
    model = model.to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, LKA):
            module.conv_spatial.forward = MethodType(dilated_by_phases, module.conv_spatial)  # type: ignore[method-assign]
    no_decay = ("layer_scale_1", "layer_scale_2")
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, weight_decay, no_decay), lr=lr)
    steps = len(images) // batch_size
    schedule = CosineLRScheduler(
        optimizer, t_initial=steps * len(sizes), warmup_t=2 * steps, warmup_lr_init=lr / 100, t_in_epochs=False
    )
    mix = Mixup(0.2, 1.0, prob=0.3, switch_prob=0.5, label_smoothing=0.1, num_classes=len(CLASSES))
    erase = RandomErasing(probability=0.25, max_area=0.2, mode="const", device="cpu")
    loss_of = SoftTargetCrossEntropy()

    # One file holds everything that the next epoch needs, so an interrupted run resumes after the last epoch.
    progress_file = out.with_name(out.name + ".resume")
    first = 0
    if progress_file.exists():
        saved = torch.load(progress_file, weights_only=True)
        first = saved["epoch"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        np.random.seed(seed + first)
        click.echo(f"resuming after epoch {first} from {progress_file}")

    for epoch in range(first, len(sizes)):
        size = sizes[epoch]
        started = time.perf_counter()
        model.train()
        total = 0.0
        batches = torch.randperm(len(images))[: steps * batch_size].reshape(steps, batch_size)
        for step, chosen in enumerate(track(batches, f"epoch {epoch + 1}", steps, transient=True)):
            x = erase(enlarge(crop_and_flip(images[chosen]), size))
            x, y = mix(x, labels[chosen])
            loss = loss_of(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step_update(epoch * steps + step + 1)
            total += loss.item()
        line = f"epoch {epoch + 1}/{len(sizes)} size {size} loss {total / steps:.4f}"
        if (epoch + 1) % 5 == 0 or epoch + 1 == len(sizes):
            line += f" top-1 {evaluate(model, test_images, test_labels, size):.4f}"
        click.echo(f"{line} ({time.perf_counter() - started:.0f} s)")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save({**state, "epoch": epoch + 1, "rng": torch.get_rng_state()}, progress_file)

    save({"arch": "van_nano", "epoch": len(sizes), "state_dict": model.state_dict()}, out)
    progress_file.unlink(missing_ok=True)
    click.echo(f"wrote {out} ({out.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
