"""A fence: fields, defaults and limits of the configuration change only on purpose.

After a change you mean: ``python tests/unit/config/test_schema_fence.py`` writes schema.json anew; name the change
in CHANGELOG.
"""

import json
from pathlib import Path

from mempool.config import ClusterConfig

SNAPSHOT = Path(__file__).with_name("schema.json")


def _without_prose(schema: object) -> object:
    """Titles and descriptions are pydantic's and the docstrings' matter."""
    if isinstance(schema, dict):
        return {
            key: _without_prose(value)
            for key, value in schema.items()
            if key not in ("title", "description") or not isinstance(value, str)
        }
    return [_without_prose(item) for item in schema] if isinstance(schema, list) else schema


def test_the_configuration_is_as_recorded() -> None:
    assert _without_prose(ClusterConfig.model_json_schema()) == json.loads(SNAPSHOT.read_text()), (
        f"The configuration's fields changed. If you mean it: python {Path(__file__).name}, and a line in CHANGELOG."
    )


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(_without_prose(ClusterConfig.model_json_schema()), indent=2) + "\n")
