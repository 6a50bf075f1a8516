"""Write the default parity inputs: the first test images of every CIFAR-10 class, as PNG files.

    python scripts/embed_images.py --data cifar10.tar.gz --out weights/parity_images

Each file name starts with the class.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import click
from PIL import Image


@click.command(help=__doc__)
@click.option("--data", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--per-class", default=4, show_default=True)
def main(data: Path, out: Path, per_class: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    written = 0
    with tarfile.open(data) as tar:
        for member in tar:
            *_, split, label, name = ("", "", *Path(member.name).parts)
            if member.isfile() and split == "test" and Path(name).stem.isdigit() and int(Path(name).stem) < per_class:
                handle = tar.extractfile(member)
                assert handle is not None  # true after isfile()
                image = Image.open(io.BytesIO(handle.read())).convert("RGB")
                image.save(out / f"{label}_{Path(name).stem}.png", optimize=True)
                written += 1
    click.echo(f"wrote {written} images to {out}")


if __name__ == "__main__":
    main()
