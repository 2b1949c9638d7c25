"""Writes what `config` of the chart may hold: `python deploy/tools/values_schema.py`.

The rest of the chart's `values.schema.json` is written by hand; the settings of the
server are those of `ServiceConfig`, without the ones that the chart derives itself.
"""

import json
from pathlib import Path
from typing import Any

from skfac.service.config import ServiceConfig

TARGET = Path(__file__).parent.parent / "helm" / "skfac" / "values.schema.json"

DERIVED = frozenset({
    "access_file", "address", "device", "health_address", "insecure_metrics",
    "insecure_remote", "metrics_address", "state_dir", "tls_certificate",
    "tls_client_ca", "tls_key",
})  # fmt: skip
"""Settings that follow from other values of the chart, in `_helpers.tpl`."""


def with_settings(schema: dict[str, Any]) -> dict[str, Any]:
    """Put the server's settings into the schema of the chart's values.

    Args:
        schema: Of all values.

    Returns:
        A copy whose `config` accepts what the server does.
    """
    known = ServiceConfig.model_json_schema()["properties"]
    properties = {
        name: {key: value for key, value in known[name].items() if key != "title"}
        for name in known
        if name not in DERIVED
    }
    config = {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }
    return {**schema, "properties": {**schema["properties"], "config": config}}


def written() -> str:
    """Write the schema as the file holds it.

    Returns:
        JSON with an end of line.
    """
    schema = json.loads(TARGET.read_text())
    return json.dumps(with_settings(schema), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    TARGET.write_text(written())
