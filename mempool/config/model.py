"""The base of all configuration models: pydantic's checks, told as ``ConfigError`` in the user's terms.

Leaves to others: what the fields are (``table``, ``cluster``), and which line of a file they stand in (``file``).
"""

import difflib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mempool.errors import ConfigError
from mempool.types.schema_checks import Range, shown

Loc = tuple[str | int, ...]
_Init = TypeVar("_Init", bound=Callable[..., None])


class FieldProblem(ValueError):
    """Raised by a validator of something with several fields to name the one at fault.

    Args:
        loc: Where the field is, seen from what is validated.
        value: Its value.
        text: What is wrong and what to do, to follow "field = value ".
    """

    def __init__(self, loc: Loc, value: object, text: str) -> None:
        super().__init__(text)
        self.loc = loc
        self.value = value


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing wrong: ``loc`` leads to the field from the outermost model, ``text`` is to follow its path."""

    loc: Loc
    text: str


def plain_init(init: _Init) -> _Init:
    """Mark an ``__init__`` that only maps arguments and errors.

    Pydantic then validates nested data without calling it; it would otherwise see one opaque error for the nested model
    where it can give the path to the field.
    """
    vars(init)["__pydantic_base_init__"] = True
    return init


class ConfigModel(BaseModel):
    """A frozen model that takes known fields only and raises ``ConfigError``, however it is made."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    by_position: ClassVar[str] = ""
    """The argument that may be given without its name."""
    called_wrong: ClassVar[str] = ""
    """What else to say to whoever gives others so."""

    def __new__(cls, /, *given: object, **data: object) -> Self:
        if len(given) > bool(cls.by_position) or (given and cls.by_position in data):
            names = ", ".join(name for name in cls.model_fields if name != "type")
            raise TypeError(f"{cls.__name__} takes its arguments by name: {names}{cls.called_wrong}")
        return super().__new__(cls)

    @plain_init
    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise _config_error(error, type(self)) from None

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Make the model of a mapping. Raises ConfigError."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise _config_error(error, cls) from None

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """Make the model of JSON text. Raises ConfigError."""
        try:
            return super().model_validate_json(json_data, **options)
        except ValidationError as error:
            raise _config_error(error, cls) from None

    @classmethod
    def check(cls, data: object, *, context: Mapping[str, object] | None = None) -> Self | list[Problem]:
        """Make the model, or say all that is wrong; for callers that know where the data came from."""
        try:
            return super().model_validate(data, context=context)
        except ValidationError as error:
            return _problems(error, cls)


def path_text(loc: Loc) -> str:
    """("tables", 0, "name") -> "tables[0].name"."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def value_text(value: object) -> str:
    """A value as it is shown in messages: numbers with underscores, text in quotes, long things cut."""
    return repr(value) if isinstance(value, BaseModel) else shown(value)


def within(allowed: Range) -> Any:
    """The field's limits, for ``Annotated``: those that every other door of the pool has too."""
    return Field(ge=allowed.low, lt=allowed.high) if allowed.below else Field(ge=allowed.low, le=allowed.high)


def _whole_number(value: object) -> int:
    if not isinstance(value, bool):
        try:
            return operator.index(value)  # type: ignore[arg-type]  # that it may have no __index__ is the question
        except TypeError:
            pass
    raise ValueError("is not a whole number")


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("is not a number")
    return value


def _flag(value: object) -> object:
    if not isinstance(value, bool):
        raise ValueError("is not true or false")
    return value


# Pydantic alone takes True for 1, "8" for 8 and "no" for False; numpy's integers are welcome.
WholeNumber = Annotated[int, BeforeValidator(_whole_number)]
Number = Annotated[float, BeforeValidator(_number)]
Flag = Annotated[bool, BeforeValidator(_flag)]

_TEXTS = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be finite",
    "float_type": "is not a number",
    "float_parsing": "is not a number",
    "string_type": "is not text; put it in quotes",
    # Names are the only text with a pattern.
    "string_pattern_mismatch": "must begin with a letter and go on with letters, digits, _ . or -, at most 63 in all",
    "literal_error": "must be {expected}",
    "union_tag_invalid": "must be one of {expected_tags}",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping of names to values",
}


def _config_error(error: ValidationError, model: type[ConfigModel]) -> ConfigError:
    found = [f"{path_text((model.__name__, *p.loc))}{p.text}" for p in _problems(error, model)]
    return ConfigError(found[0] if len(found) == 1 else "\n  ".join([f"{len(found)} problems:", *found]))


def _problems(error: ValidationError, model: type[ConfigModel]) -> list[Problem]:
    return [_problem(details, model) for details in error.errors(include_url=False)]


def _problem(details: Any, model: type[ConfigModel]) -> Problem:
    """One of pydantic's error details as a problem. Any: the keys of pydantic's ``ctx`` differ by kind of error."""
    loc, models = _walk(model, details["loc"])
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    names = sorted({name for m in models for name in m.model_fields})
    match kind:
        case "missing":
            return Problem(loc=loc, text=" is missing")
        case "extra_forbidden":
            shown = "" if isinstance(value, dict | list) else f" = {value_text(value)}"
            return Problem(loc=loc, text=f"{shown} is not a known field{_suggestion(str(loc[-1]), names)}")
        case "union_tag_not_found":
            tags = ", ".join(str(m.model_fields["type"].default) for m in models)
            return Problem(loc=(*loc, "type"), text=f" is missing; give one of: {tags}")
        case "literal_error":
            name = str(value).rpartition(".")[2]
            if not isinstance(value, str) and f"'{name}'" in context["expected"]:
                return Problem(loc=loc, text=f" = {value_text(value)} must be a text: write {name!r}")
        case "union_tag_invalid":
            loc, value = (*loc, "type"), value["type"]
        case "model_type" | "model_attributes_type" if len(models) > 1:
            types = [str(m.model_fields["type"].default) for m in models]
            tag = value if value in types else types[0]
            return Problem(
                loc=loc,
                text=f" = {value_text(value)} must be a mapping, as {{type: {tag}}} with its fields beside it, or in "
                f"Python one of {', '.join(f'{m.__name__}(...)' for m in models)}",
            )
        case "model_type" | "model_attributes_type":
            return Problem(
                loc=loc, text=f" = {value_text(value)} must be a mapping, with fields of: {', '.join(names)}"
            )
    problem = context.get("error")
    if isinstance(problem, FieldProblem):
        loc, value = (*loc, *problem.loc), problem.value
    if isinstance(problem, ValueError):
        text = str(problem)
    else:
        template = _TEXTS.get(kind)
        numbers = {
            key: value_text(limit) if isinstance(limit, int | float) else limit for key, limit in context.items()
        }
        text = template.format(**numbers) if template else f"is not valid: {details['msg']}"
    return Problem(loc=loc, text=f" = {value_text(value)} {text}")


def _walk(model: type[ConfigModel], loc: Loc) -> tuple[Loc, tuple[type[ConfigModel], ...]]:
    """Follow pydantic's path: the path without its union tags, and the models at its end.

    Where the last part is no model's field, these are the models it was looked for in.
    """
    models: tuple[type[ConfigModel], ...] = (model,)
    path: list[str | int] = []
    for part in loc:
        tagged = tuple(m for m in models if "type" in m.model_fields and m.model_fields["type"].default == part)
        if tagged and len(models) > 1:
            models = tagged
            continue
        path.append(part)
        within = [m.model_fields[part].annotation for m in models if isinstance(part, str) and part in m.model_fields]
        models = tuple(found for annotation in within for found in _models_in(annotation)) or models
    return tuple(path), models


def _models_in(annotation: object) -> Iterator[type[ConfigModel]]:
    """The configuration models an annotation speaks of: ``tuple[T, ...] | None`` -> T."""
    if isinstance(annotation, type) and issubclass(annotation, ConfigModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _suggestion(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(known)}"
