"""A work without a model: the mean of a file's bytes. Slow where a test kills it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from fastvim.errors import UserError
from fastvim.inference.parts.work import Failure


@dataclass
class Toy:
    """Rows of {"value": mean, "number": of the image in the list}."""

    command: str = "toy"
    scale: float = 1.0
    weights: str = "w0"
    seconds: float = 0.0  # of an image

    def open(self, device):
        return OpenToy(self)


class OpenToy:
    batch_size = 4
    endings = (".bin",)

    def __init__(self, work):
        self.work, self.weights, self.read = work, work.weights, ToyRead()
        self.heard = []

    def settings(self):
        return {"scale": self.work.scale}

    def items(self, found):
        for number, item in enumerate(found):
            yield {**item, "number": number}

    def prepare(self, images):
        return images, {}

    def rows(self, items, images, out):
        assert len(items) == len(images) <= self.batch_size
        time.sleep(self.work.seconds * len(items))
        values = (images.flatten(1).mean(1) * self.work.scale).tolist()
        return [
            {"value": value, "number": item["number"]}
            if value < 250
            else {"error": "the model's result is not finite"}
            for item, value in zip(items, values, strict=True)
        ]

    def hear(self, told):
        self.heard.append(told)

    def pass_on(self):
        heard, self.heard = self.heard, []
        return sum(heard)

    remarks = ()

    def describe(self, row, out):
        return str(row["value"])

    def finish(self, rows, out):
        out.write("count", str(sum(1 for _ in rows())).encode())
        return ["counted"]

    def columns(self):
        import pyarrow

        return pyarrow.schema([("value", pyarrow.float64()), ("number", pyarrow.int64())])


class ToyRead:
    def __init__(self):
        self.count = 0

    def __call__(self, path):
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        if not content:
            raise UserError(f"{path}: no bytes")
        self.count += 1
        return torch.tensor([[[sum(content) / len(content)]]])

    batch = staticmethod(torch.stack)

    def told(self):
        count, self.count = self.count, 0
        return count


@dataclass
class Quiet:
    """A listener that remembers."""

    images: int = 0
    waiting: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    begun: tuple[int, int] = (0, 0)

    def begin(self, images, done):
        self.begun = (images, done)

    def advance(self, images, spent):
        self.images += images
        self.waiting += spent.waiting
        assert 0 <= spent.waiting <= spent.seconds

    def failed(self, failure):
        self.failures.append(failure)

    def say(self, line):
        self.lines.append(line)


def write_files(folder, count):
    """Files 0.bin, 1.bin, … of one byte each; every seventh is empty, one is a result that is none.

    Returns:
        The paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        path = folder / f"{number}.bin"
        path.write_bytes(b"" if number % 7 == 6 else bytes([255 if number == 3 else number % 200]))
        paths.append(str(path))
    return paths
