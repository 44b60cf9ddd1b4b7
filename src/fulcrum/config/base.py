"""What settings are made of: the base of their sections, anchors, and where rows come from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fulcrum.core import user_paths
from fulcrum.core.errors import ConfigError
from fulcrum.core.types import Anchor, Placement

AUTO = "auto"  # in place of an anchor's text


def _expanded(path: str) -> str:
    try:
        return user_paths.expanded(path)
    except ConfigError as error:
        raise ValueError(str(error)) from None


UserPath = Annotated[str, AfterValidator(_expanded)]  # `~` and environment variables replaced


class Section(BaseModel):
    """Base of all settings: frozen, and unknown keys are refused.

    A single value is accepted for a list of names or numbers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _accept_single(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        if _is_list(kind):
            value = _listed(value)
        # Python takes True for 1: `repeats: yes` would be one repeat.
        if bool not in (kind, *get_args(kind)):
            _refuse_truth_values(value)
        return value


class AnchorSettings(Section):
    """The anchor prompt of a task."""

    text: str = Field(
        min_length=1,
        description="the anchor's words; auto: some are proposed, scored without any training, and "
        "one is chosen",
    )
    placement: Placement = Field("user_prefix", description="its place in every row of the task")
    candidates: tuple[str, ...] = Field(
        (), description="of auto: texts of yours among which it may choose too"
    )
    paraphrase: str | None = Field(
        None,
        min_length=1,
        description="the same in other words, in which the trained model is asked too; none: made "
        "by rule",
    )

    @field_validator("candidates", mode="before")
    @classmethod
    def _accept_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value  # a sentence with commas is one anchor

    @field_validator("text", "paraphrase", "candidates")
    @classmethod
    def _check_visible(cls, value: Any) -> Any:
        for text in _items(value):
            if text is not None and not _is_visible(text):
                raise ValueError(
                    f"an anchor needs words, {text!r} shows none; leave it out, or write some"
                )
        return value

    @model_validator(mode="after")
    def _check_candidates(self) -> "AnchorSettings":
        if self.candidates and not self.is_auto:
            raise ValueError(
                "candidates are for `text: auto`, which chooses among them; this anchor has its "
                "text"
            )
        return self

    @property
    def is_auto(self) -> bool:
        """Return whether the text is yet to be chosen."""
        return self.text == AUTO

    @property
    def value(self) -> Anchor:
        """Return the anchor as a plain record."""
        return Anchor(self.text, self.placement)


class DataSource(Section):
    """Where rows come from, and how the columns are named."""

    path: UserPath = Field(
        min_length=1,
        description="file (.jsonl .json .csv .parquet .arrow), folder, glob, hub id, or `builtin`",
    )
    name: str | None = Field(None, description="configuration name of a hub data set")
    split: str = Field("train", description="split of a hub data set, slices as in `train[:1%]`")
    revision: str | None = Field(None, description="commit or tag of a hub data set")
    columns: dict[str, str | None] = Field(
        default_factory=dict,
        description="our column name -> the file's, e.g. {prompt: text}; null: none of them",
    )
    limit: int | None = Field(
        None, ge=1, description="use at most this many rows, drawn by `seed` before repeats go"
    )


Sources = tuple[DataSource, ...]
Accepted = dict[str, tuple[str, ...]]


class GeneralSource(DataSource):
    """A source of general data: its part of the mix, and which of its rows may be used."""

    weight: float | None = Field(
        None,
        gt=0,
        description="its part of the general rows, in mix.unit; none: every source's rows are as "
        "likely as others",
    )
    include: Accepted = Field(
        default_factory=dict,
        description="column -> values, of which a row must have one, as {family: [qa, 'summar*']}",
    )
    exclude: Accepted = Field(
        default_factory=dict, description="column -> values, of which a row must have none"
    )
    languages: tuple[str, ...] = Field(
        (), description="ISO 639-1 codes, as [en, is]; rows in other languages are skipped"
    )
    min_words: int = Field(0, ge=0, description="rows with fewer words in all are skipped")
    max_words: int | None = Field(None, ge=1, description="rows with more words in all are skipped")
    stream: bool = Field(
        False,
        description="read a hub data set row by row until `limit` rows are there, instead of "
        "downloading it whole",
    )

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _list_values(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        listed = {}
        for name, item in value.items():
            items = _items(item)
            if any(isinstance(part, bool) for part in items):
                raise ValueError(
                    f"{name}: YAML reads yes, no, on, off and true, false as truth values; quote "
                    "them: 'no', 'true'"
                )
            listed[name] = list(map(str, items))
        return listed

    @model_validator(mode="after")
    def _check_limits(self) -> "GeneralSource":
        if self.stream and self.limit is None:
            raise ValueError(
                f"{self.path}: a streamed data set needs `limit:`, the number of rows to read"
            )
        if self.max_words is not None and self.max_words < self.min_words:
            raise ValueError(
                f"{self.path}: max_words {self.max_words} is below min_words {self.min_words}"
            )
        return self


GeneralSources = tuple[GeneralSource, ...]


def as_anchor(value: Any) -> Any:
    """Accept a text or a plain record as an anchor; `none` is none."""
    if value in (None, "none"):
        return None
    if isinstance(value, Anchor):
        return {"text": value.text, "placement": value.placement}
    return {"text": value} if isinstance(value, str) else value


def as_sources(value: Any) -> Any:
    """Accept a path, a mapping or a list of these as sources."""
    if value is None:
        return ()
    sources = []
    for item in _items(value):
        sources.append({"path": str(item)} if isinstance(item, str | Path) else item)
    return tuple(sources)


def may_hold_secret(address: str) -> bool:
    """Return whether an address may hold a password or key.

    That is if it has a name or password before its host (also without `https://`), or anything
    after `?`.
    """
    host = (address.partition("//")[2] or address).partition("/")[0]
    return "@" in host or "?" in address


def _is_list(kind: Any) -> bool:
    """Return whether a field takes a list of names or numbers, and no single text."""
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if str in options:
        return False
    lists = [option for option in options if get_origin(option) is tuple]
    return any(_is_plain(get_args(option)[0]) for option in lists)


def _is_plain(kind: Any) -> bool:
    """Return whether a kind is a name or a number, or may be one."""
    return kind in (str, int, float) or any(map(_is_plain, get_args(kind)))


def _listed(value: Any) -> Any:
    """Return the list that a text with commas, or a single number, is short for."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [value]
    return value


def _refuse_truth_values(value: Any) -> None:
    for item in _items(value):
        if isinstance(item, bool):
            raise ValueError(
                "takes no truth value (YAML reads yes, no, on and off as such; quote them where "
                "they are text)"
            )


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _is_visible(text: str) -> bool:
    return any(character.isprintable() and not character.isspace() for character in text)
