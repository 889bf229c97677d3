"""Examining the images of a run before it: what is wrong, what looks odd, how splits compare."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from fastvim.data.base import DataModule
from fastvim.data.issues import Issue, Issues, Look, NoFiles, SplitReport, examine
from fastvim.data.known import Known
from fastvim.data.sampler import Seeded, TrainingSampler
from fastvim.errors import OptionError, UserError, counted, first_few

SAMPLE = 300  # images of each split that a run examines before its first step
FEW = 10  # classes; of more, a sample may miss some
SPLITS = ("train", "val", "test")

Watch = Callable[[Iterable[Look], str, int], Iterator[Look]]


def _unwatched(looks: Iterable[Look], doing: str, total: int) -> Iterator[Look]:
    return iter(looks)


def check_data(
    data: DataModule,
    roles: Sequence[str] = SPLITS,
    *,
    sample: int | None = None,
    workers: int = 4,
    with_labels: bool = True,
    watch: Watch = _unwatched,
) -> list[SplitReport]:
    """Examine the splits of some roles; lists of files and labels whole.

    What a full check has seen of files that are unchanged since (`fastvim.data.known`) is not read
    again.

    Args:
        data: whose files are there (`prepare_data`).
        roles: "train", "val" or "test", in this order; the first one settles the classes.
        sample: how many images of each split to read, drawn with the data's seed; None for all, 0
            for the lists alone.
        workers: files read at a time.
        with_labels: whether training uses the labels.
        watch: shows the progress; it is given what is seen, what is done in words, and how many
            images there are.

    Raises:
        UserError: no split can be opened, or data that cannot be checked.
    """
    reports: dict[str, SplitReport] = {}  # roles may share a split
    failed: dict[str, UserError] = {}
    for role in roles:
        try:
            report = data.check(role)
        except OptionError:
            raise
        except UserError as error:
            failed[str(error)] = error
            report = reports.setdefault(str(error), SplitReport(role, NoFiles()))
            report.errors["split that cannot be opened"] = Issue(1, str(error))
            continue
        settings = [*data.reading(role), report.split]
        if (key := json.dumps(settings)) in reports:
            continue
        reports[key] = report
        if sample != 0:
            _read(report, Known(settings), sample, data.seed, workers, watch)
        _judge(report, role == "train", with_labels, data.classes_from)
        eight_bits = report.brightest.number_of_8_bits == sum(report.sizes.values()) > 0
        if data.value_range is not None and eight_bits and not data.read_picture.scales_8_bits:
            where = f"{list(data.value_range)}, {report.split} has values of 0 to 255"
            report.warnings.add(f"value_range that no image needs{report.among()}", where)
    if len(failed) == len(reports):
        raise next(iter(failed.values()))
    first, *others = reports.values()
    for other in others:
        _compare(first, other)
    return list(reports.values())


def _read(
    report: SplitReport,
    known: Known,
    sample: int | None,
    seed: int,
    workers: int,
    watch: Watch,
) -> None:
    """Add what the files of a split show: all of them, or a sample and what is known."""
    files = report.files
    total = len(files)
    looks = known.load(files)
    chosen = np.arange(total)
    if sample is not None and sample < total:
        chosen = np.random.default_rng(seed).permutation(total)[:sample]
    unread = [index for index in sorted(chosen.tolist()) if index not in looks]
    report.read = len(looks) + len(unread)
    seen = watch(examine(files, unread, workers), f"reading {report.split}", len(unread))
    looks |= zip(unread, seen, strict=True)
    if sample is None and total:
        known.save(files, looks)
    for index in sorted(looks):
        report.add(index, looks[index])


def _judge(report: SplitReport, training: bool, with_labels: bool, source: str) -> None:
    """Add what the samples of a split show together."""
    from_pixels = report.labels is not None or report.read_labels is not None
    if report.labels is not None:
        numbers = [report.values[stored] for stored in report.labels.stored]
        report.classes = dict(zip(report.classes, numbers, strict=True))
    elif report.read_labels is not None:
        numbers = [report.read_labels[label] for label in range(len(report.classes))]
        report.classes = dict(zip(report.classes, numbers, strict=True))
    if with_labels and report.unlabelled:
        report.errors.add("split without classes", report.unlabelled)
    known = bool(report.classes) and (report.read or not from_pixels)
    if with_labels and known and not report.errors:  # else pixels or images are missing
        _judge_classes(report, training, source)
    if training and not len(report.files) and report.dropped:
        report.errors.add("split without an image to train on", f"left out: {report.dropped}")
    if not report.read:
        return
    usable = sum(report.sizes.values())
    if training and not usable and report.skips and report.dropped:
        kind, (number, first) = next(iter(report.dropped.items()))
        report.errors.add(f"{kind}, as are all of them", first, number)
    if 2 * report.blank > usable:
        where = f"{report.blank:,} of {usable:,}"
        report.warnings.add(f"image all black or all white{report.among()}", where, report.blank)
    elif dark := report.brightest.warning():
        report.warnings.add(f"split of dark images{report.among()}", dark)
    if training and report.normalised:
        for kind, channels in (
            ("channel of one value", report.channels.constant()),
            ("channel that mean and std do not fit", report.channels.unlike(*report.normalised)),
        ):
            if channels:
                report.warnings.add(kind + report.among(), first_few(channels), len(channels))


def _judge_classes(report: SplitReport, training: bool, source: str) -> None:
    """Add what is wrong or odd about the numbers of the classes."""
    names, counts = list(report.classes), report.counted
    seen = [name for name in names if report.classes[name]]
    unseen = [name for name in names if not report.classes[name]]
    among = report.among_counted()
    # What a sample lacks may be elsewhere.
    stops = report.errors if training and not among else report.warnings
    advice = "" if report.labels is None else _of_ignored(report)
    if not seen:
        stops.add(f"split without {counts} of any class{among}", f"{report.split}{advice}")
    elif training and len(seen) == 1 and counts != "objects":
        where = f"{source}: class {seen[0]} has all {counted(report.classes[seen[0]], counts)}"
        where += f", none has class {first_few(unseen, FEW)}" if unseen else ""
        stops.add(f"one class in all{among}", f"{where}{advice}; expected two classes or more")
    elif training and unseen and (not among or len(names) <= FEW):
        where = f"class {first_few(unseen, FEW)}{advice}"
        report.warnings.add(f"class without {counts}{among}", where, len(unseen))


def _of_ignored(report: SplitReport) -> str:
    """How many pixels do not count, and what to change."""
    assert report.labels is not None
    parts = []
    for value in report.labels.ignored:
        if number := report.values[value]:
            why = "reduce_zero_label leaves out" if value == 0 else "does not count"
            has = "has" if number == 1 else "have"
            parts.append(f"{counted(number, 'pixels')} {has} the value {value}, which {why}")
    if not parts:
        return ""
    stored = report.labels.stored
    return f"; {'; '.join(parts)} (the classes are stored as {stored[0]} to {stored[-1]})"


def _compare(first: SplitReport, other: SplitReport) -> None:
    """Add to the other split which of its images the first one has too."""
    paths = {*map(os.path.normpath, _paths(first))}
    twice = [path for path in _paths(other) if os.path.normpath(path) in paths]
    if twice:
        other.warnings.add(f"file that {first.split} has too", twice[0], len(twice))
    shared = [digest for digest in other.digests if digest in first.digests]
    pairs = [
        tuple(each.files.filename(each.digests[digest][0]) for each in (other, first))
        for digest in shared
    ]
    copies = [(own, same) for own, same in pairs if os.path.normpath(own) not in paths]
    if copies:
        own, same = copies[0]
        kind = f"image with the content of one of {first.split}"
        other.warnings.add(kind, f"{own}, as {same}", len(copies))


def _paths(report: SplitReport) -> Iterator[str]:
    return map(report.files.filename, range(len(report.files)))


def findings(reports: Sequence[SplitReport]) -> tuple[Issues, Issues, Issues]:
    """What would stop a run, what looks odd and what is left out, of all splits."""
    errors, warnings, left_out = Issues(), Issues(), Issues()
    for report in reports:
        for found, issues in (
            (errors, report.errors),
            (warnings, report.warnings),
            (left_out, report.dropped),
            (left_out, report.left_out),
        ):
            for kind, (number, where) in issues.items():
                found.add(f"{report.split}: {kind}", where, number)
    return errors, warnings, left_out


def training_samples(data: DataModule, number: int) -> list[tuple[Tensor, Any]]:
    """The first images that training will see, with their augmentation and labels.

    Args:
        data: whose files are there (`prepare_data`).
        number: at most.
    """
    files, finish = Seeded(data.opened("train"), data.seed), data.finish("train")
    samples = [files[key] for key in islice(TrainingSampler(files, data.seed), number)]
    return samples if finish is None else [(finish(image), label) for image, label in samples]
