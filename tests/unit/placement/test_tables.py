"""A table is planned as its schema says."""

import numpy as np
import pytest

from mempool.placement import assignment_of, plan, plan_table
from mempool.types import Placement, ProductKeySpec
from tests.support.faulty import make_schema


@pytest.mark.parametrize("layout", ["auto", "rows", "columns"])
def test_equals_the_plan_of_its_numbers(layout: str) -> None:
    schema = make_schema(layout=layout, keys=ProductKeySpec(heads=2, key_dim=4))
    numbers = {
        "num_row_pages": schema.num_row_pages,
        "num_blocks": schema.num_blocks,
        "num_key_pages": schema.num_key_pages,
        "layout": schema.layout,
    }
    assert numbers == {"num_row_pages": 8, "num_blocks": 3, "num_key_pages": 2, "layout": layout}
    first = plan_table(schema, None, [0, 1])
    placement = Placement(table_id=1, epoch=1, owners=first.owners, key_owners=first.key_owners)
    present = assignment_of(placement)
    after = plan_table(schema, present, [0, 1, 2])
    for found, expected in ((first, plan(None, [0, 1], **numbers)), (after, plan(present, [0, 1, 2], **numbers))):
        assert np.array_equal(found.owners, expected.owners)
        assert np.array_equal(found.key_owners, expected.key_owners)
