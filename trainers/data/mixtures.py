"""Mixtures: several datasets as one, described by plain values that fit into a YAML file."""

import logging
from dataclasses import dataclass, field, fields
from typing import Any

import datasets

logger = logging.getLogger(__name__)

SPLIT_SEED = 42  # of the split into training and test rows, the same on every process and in every run


@dataclass
class DatasetConfig:
    """One dataset of a mixture; all but `columns` and `fraction` are arguments of `datasets.load_dataset`.

    Attributes:
        path: path or hub name of the dataset.
        name: its configuration.
        data_dir: the folder of its data.
        data_files: the files of its data.
        split: the split to load.
        columns: the columns to keep; None keeps all.
        fraction: its share of the mixture, relative to the other datasets' fractions. The mixture is as large as it
            can be without any row twice; of each dataset, the first rows are taken. Either all datasets have a fraction
            or none; without, each is taken whole.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, str] | None = None
    split: str = "train"
    columns: list[str] | None = None
    fraction: float | None = None


@dataclass
class DatasetMixtureConfig:
    """The datasets of a mixture.

    Attributes:
        datasets: a `DatasetConfig` each, or a mapping of its fields (as YAML gives it).
        streaming: whether to stream them.
        test_split_size: the share (below 1) or number of rows to split off as test set; None splits off none.
    """

    datasets: list[DatasetConfig] = field(
        default_factory=list,
        metadata={"help": "The datasets of a mixture, in a YAML file: path, name, split ... each."},
    )
    streaming: bool = field(default=False, metadata={"help": "Stream the datasets of the mixture."})
    test_split_size: float | None = field(
        default=None, metadata={"help": "Share (below 1) or number of the mixture's rows to split off as test set."}
    )

    def __post_init__(self) -> None:
        known = [f.name for f in fields(DatasetConfig)]
        for index, entry in enumerate(self.datasets):
            if isinstance(entry, DatasetConfig):
                continue
            unknown = [key for key in entry if key not in known] if isinstance(entry, dict) else [repr(entry)]
            if unknown or "path" not in entry:
                raise ValueError(
                    f"`datasets[{index}]` has {'no path' if not unknown else 'the unknown field ' + str(unknown[0])}; "
                    f"give it a path, and of {', '.join(known[1:])} what is needed."
                )
            self.datasets[index] = DatasetConfig(**entry)


def get_dataset(mixture_config: DatasetMixtureConfig) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Load the datasets of a mixture, one after the other, as split "train", and "test" if one is split off.

    The rows of the test set are drawn with a fixed seed.

    Raises:
        ValueError: there is no dataset, or the fractions or the test set do not fit.
    """
    configs = mixture_config.datasets
    if not configs:
        raise ValueError("The mixture has no dataset; name at least one in `datasets`.")
    shares = _shares(configs, mixture_config.streaming)
    if mixture_config.streaming and mixture_config.test_split_size is not None:
        raise ValueError(
            "A stream cannot be split, so `test_split_size` does not go with `streaming`; drop one of them."
        )
    parts: list[Any] = []
    for config in configs:
        part = datasets.load_dataset(
            path=config.path,
            name=config.name,
            data_dir=config.data_dir,
            data_files=config.data_files,
            split=config.split,
            streaming=mixture_config.streaming,
        )
        parts.append(part if config.columns is None else part.select_columns(config.columns))

    if shares is not None:
        total = min(len(part) / share for part, share in zip(parts, shares) if share)
        parts = [part.select(range(round(share * total))) for part, share in zip(parts, shares)]
    mixture: Any = datasets.concatenate_datasets(parts)
    if mixture_config.streaming:
        return datasets.IterableDatasetDict({"train": mixture})
    logger.info(f"The mixture of {len(parts)} datasets has {len(mixture)} rows.")
    if mixture_config.test_split_size is None:
        return datasets.DatasetDict({"train": mixture})
    size = mixture_config.test_split_size
    return mixture.train_test_split(test_size=int(size) if size >= 1 else size, seed=SPLIT_SEED)


def _shares(configs: list[DatasetConfig], streaming: bool) -> list[float] | None:
    """The fractions, summing to one; None if there are none."""
    fractions = [config.fraction for config in configs]
    given = [fraction for fraction in fractions if fraction is not None]
    if not given:
        return None
    if len(given) < len(fractions):
        missing = configs[fractions.index(None)].path
        raise ValueError(
            f"Dataset {missing!r} has no `fraction`, but others have; set it for all datasets or for none."
        )
    if streaming:
        raise ValueError(
            "The length of a stream is unknown, so `fraction` does not go with `streaming`; drop one of them."
        )
    if min(given) < 0 or sum(given) == 0:
        raise ValueError(
            f"The datasets' fractions are {given}; none may be negative, and at least one must be above 0."
        )
    return [fraction / sum(given) for fraction in given]
