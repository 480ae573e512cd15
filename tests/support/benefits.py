"""Benefits in the shape of SHOPLINE's GraphQL, for tests of what imports them."""

import json
from typing import Any

from google.protobuf.json_format import MessageToDict

from pointbook.v1 import benefits_pb2
from pointbook_server.benefits.messages import NAMES

FIELDS = {field.json_name: field for field in benefits_pb2.Benefit.DESCRIPTOR.fields if field.number in range(7, 31)}


def info(**values: Any) -> dict[str, Any]:
    """Make a BenefitsInfo as SHOPLINE answers it: all 24 fields, most of them null."""
    return {**dict.fromkeys(FIELDS), **values}


def answer(*benefits: Any, **others: Any) -> dict[str, Any]:
    """Make the answer for a level that has benefits, and what else was asked for."""
    return {"data": {"benefitsOfMembership": {"benefitsInfo": list(benefits), **others}}}


def privilege(**values: Any) -> dict[str, Any]:
    """Make a custom privilege as SHOPLINE answers it."""
    return {"privilegeName": "Lounge", "privilegeDescription": None, "benefitsIcon": None, **values}


def exported(benefits: list[benefits_pb2.Benefit]) -> str:
    """Write benefits back in SHOPLINE's shape, what was set aside and names that are not listed in their places."""
    return json.dumps(answer(*map(_info_of, benefits)))


def _info_of(benefit: benefits_pb2.Benefit) -> dict[str, Any]:
    values: dict[str, Any] = MessageToDict(benefit)
    aside = MessageToDict(benefit.irrelevant_values)
    told = {}
    for name, field in FIELDS.items():
        own = values.get(name)
        if own is not None and field.name in NAMES:
            own = NAMES[field.name][getattr(benefit, field.name)]
        told[name] = benefit.unrecognized_values.get(field.name, aside.get(field.name, own))
    return told
