"""A table read from a file that somebody else wrote, or from one of ours: values and keys, some rows at a time."""

import json
import os

import torch
from torch import Tensor

from mempool.checkpoint.exchange.layouts import FileLayout, check_values, find_layout, key_form
from mempool.checkpoint.exchange.table_file import SCHEMA
from mempool.checkpoint.exchange.tensor_sources import TensorSource, open_tensors
from mempool.checkpoint.format.json_values import Unfit
from mempool.checkpoint.format.schema_json import parse_schema
from mempool.checkpoint.format.tensor_file import TensorEntry
from mempool.errors import DataLoss, InvalidRequest
from mempool.types import OwnKeySpec, ProductKeySpec, TableSchema
from mempool.types.keys import Grouping, grouping_of, is_key_table, key_table


class TableSource:
    """The values and keys in a file.

    Args:
        place: A safetensors file (a path or an fsspec URL), or one of torch.save on this host.
        values, keys: Names of their tensors; None to find them, as ``find_layout``.

    Raises:
        NotFound: There is no such file.
        InvalidRequest: It cannot be read, or what the table is cannot be told; with what was found.
        DataLoss: It is damaged.
    """

    def __init__(self, place: str | os.PathLike[str], *, values: str | None = None, keys: str | None = None) -> None:
        self._tensors: TensorSource = open_tensors(place)
        try:
            self.layout: FileLayout = find_layout(self._tensors.tensors, values=values, keys=keys)
        except InvalidRequest as error:
            raise InvalidRequest(f"{self._tensors.where}: {error}") from None

    @property
    def num_slots(self) -> int:
        return self.layout.values.shape[0]

    @property
    def value_dim(self) -> int:
        return self.layout.values.shape[1]

    @property
    def schema(self) -> TableSchema | None:
        """The table's, where mempool wrote the file. Raises DataLoss where it is damaged."""
        text = self._tensors.metadata.get(SCHEMA)
        if text is None:
            return None
        try:
            return parse_schema(json.loads(text), "schema")
        except (ValueError, Unfit) as error:
            raise DataLoss(f"{self._tensors.where}: the schema of its table is damaged: {error}") from None

    def check(self, schema: TableSchema) -> None:
        """Raises InvalidRequest where a table of this schema, and that of the keys that it trains, cannot take it."""
        trained, own = key_table(schema), is_key_table(schema)
        try:
            if not own:
                check_values(self.layout, schema)
            if self.layout.keys is not None and schema.keys is not None:
                key_form(self.layout.keys, trained or schema)
        except InvalidRequest as error:
            raise InvalidRequest(f"{self._tensors.where}: {error}") from None

    def values(self, first: int, count: int) -> Tensor:
        """Values of ``count`` slots from ``first`` on.

        Returns:
            [count, value_dim], float32 or bfloat16: as the file has them; others as float32.
        """
        rows = self._tensors.rows(self.layout.values.name, first, count)
        if self.layout.scales is None:
            return rows if rows.dtype in (torch.float32, torch.bfloat16) else rows.float()
        scales = self._tensors.rows(self.layout.scales.name, first, count)
        per_column = scales.repeat_interleave(self._block_dim(), dim=1)[:, : self.value_dim]
        return rows.float() * per_column

    def coded(self, schema: TableSchema, first: int, count: int) -> tuple[Tensor, Tensor] | None:
        """Values of one byte as mempool wrote them of a table whose rows lie alike; None where it did not.

        Returns:
            Their codes, [count, value_dim] uint8, and their scales, [count, column blocks] float32.
        """
        own, layout = self.schema, self.layout
        if own is None or layout.scales is None:
            return None
        if (own.dtype, own.block_dim, layout.values.dtype) != (schema.dtype, schema.block_dim, schema.dtype):
            return None
        codes = self._tensors.rows(layout.values.name, first, count).view(torch.uint8)
        return codes, self._tensors.rows(layout.scales.name, first, count)

    def flat_keys(self, schema: TableSchema, first: int, count: int) -> Tensor:
        """Keys of slots, [count, key_dim] float32. Raises InvalidRequest where there are none that fit."""
        keys = self._keys()
        if key_form(keys, schema) != "flat":
            raise InvalidRequest(f"{self._tensors.where}: table {schema.name!r} has product keys; read them by head")
        return self._tensors.rows(keys.name, first, count).float()

    def head_keys(self, schema: TableSchema, head: int) -> Tensor:
        """Product keys of one head, [2, n, key_dim / 2] float32. Raises InvalidRequest where none fit."""
        keys = self._keys()
        form = key_form(keys, schema)
        if form == "flat" or not isinstance(schema.keys, ProductKeySpec):
            raise InvalidRequest(f"{self._tensors.where}: table {schema.name!r} has flat keys; read them by slot")
        n, half = schema.stride, schema.keys.key_dim // 2
        if form == "stacked":
            return self._tensors.rows(keys.name, head * 2 * n, 2 * n).float().view(2, n, half)
        one = self._tensors.rows(keys.name, head, 1)[0].float()
        return one.transpose(0, 1).contiguous() if form == "pairs" else one

    def own_keys(self, schema: TableSchema, slots: range) -> Tensor | None:
        """Rows of a table of keys, [len(slots), width] float32; zeros where they fill a section up. None where the file
        has no keys. Raises InvalidRequest where they do not fit.
        """
        keys, tensor = schema.keys, self.layout.keys
        if tensor is None:
            return None
        assert isinstance(keys, OwnKeySpec)
        form, section = key_form(tensor, schema), schema.num_slots // keys.sections
        grouping = grouping_of(keys, schema.num_slots)
        if grouping is not None:
            return self._grouped(tensor, grouping, slots)
        if form == "flat":
            return self._tensors.rows(tensor.name, slots.start, len(slots)).float()
        found = torch.zeros(len(slots), schema.value_dim)
        for number in range(slots.start // section, -(-slots.stop // section)):
            first = number * section
            begin, end = max(slots.start, first), min(slots.stop, first + keys.rows)
            if begin < end:
                rows = self._part(tensor, form, number, keys)[begin - first : end - first]
                found[begin - slots.start : end - slots.start] = rows
        return found

    def _grouped(self, tensor: TensorEntry, grouping: Grouping, rows: range) -> Tensor:
        """Rows of hierarchical keys: in the file groups come first, and then slots."""
        numbers = torch.arange(rows.start, rows.stop)
        of_group = numbers % grouping.pitch == 0
        found = torch.empty(len(rows), tensor.shape[1])
        groups, slots = numbers[of_group] // grouping.pitch, (numbers - numbers // grouping.pitch - 1)[~of_group]
        for which, some, first in ((of_group, groups, 0), (~of_group, slots, grouping.groups)):
            if some.numel():  # they lie side by side
                found[which] = self._tensors.rows(tensor.name, first + int(some[0]), some.numel()).float()
        return found

    def _part(self, tensor: TensorEntry, form: str, section: int, keys: OwnKeySpec) -> Tensor:
        """Half-keys of one part of one head, [n, key_dim / ways]."""
        if form == "stacked":
            return self._tensors.rows(tensor.name, section * keys.rows, keys.rows).float()
        number, part = divmod(section, keys.ways)
        head = self._tensors.rows(tensor.name, number, 1)[0].float()
        return head[part] if form == "heads" else head[:, part]

    def _keys(self) -> TensorEntry:
        if self.layout.keys is None:
            raise InvalidRequest(f"{self._tensors.where} has no keys beside {self.layout.values.name!r}")
        return self.layout.keys

    def _block_dim(self) -> int:
        """Width of the columns of one scale: by the file's schema, or as many of one width as there are scales."""
        schema, scales = self.schema, self.layout.scales
        if schema is not None:
            return schema.block_dim
        assert scales is not None
        return -(-self.value_dim // scales.shape[1])
