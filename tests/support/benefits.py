"""Benefits in the form of SHOPLINE's GraphQL API."""

import json
from typing import Any

from google.protobuf.json_format import MessageToDict

from pointbook.v1 import benefits_pb2
from pointbook_server.benefits.messages import ENUM_NAMES

FIELDS = {field.json_name: field for field in benefits_pb2.Benefit.DESCRIPTOR.fields if field.number in range(7, 31)}


def benefits_info(**values: Any) -> dict[str, Any]:
    """Return a BenefitsInfo with all 24 fields, most of them null."""
    return {**dict.fromkeys(FIELDS), **values}


def level_response(*benefits: Any, **others: Any) -> dict[str, Any]:
    """Return the response for a level with benefits and other fields."""
    return {"data": {"benefitsOfMembership": {"benefitsInfo": list(benefits), **others}}}


def shopline_privilege(**values: Any) -> dict[str, Any]:
    """Return a custom privilege in SHOPLINE's form."""
    return {"privilegeName": "Lounge", "privilegeDescription": None, "benefitsIcon": None, **values}


def export_benefits(benefits: list[benefits_pb2.Benefit]) -> str:
    """Return benefits as a file in SHOPLINE's form.

    Irrelevant values and unlisted names are in their own fields.
    """
    return json.dumps(level_response(*map(_info_of, benefits)))


def _info_of(benefit: benefits_pb2.Benefit) -> dict[str, Any]:
    values: dict[str, Any] = MessageToDict(benefit)
    irrelevant_values = MessageToDict(benefit.irrelevant_values)
    info = {}
    for name, field in FIELDS.items():
        own = values.get(name)
        if own is not None and field.name in ENUM_NAMES:
            own = ENUM_NAMES[field.name][getattr(benefit, field.name)]
        info[name] = benefit.unrecognized_values.get(field.name, irrelevant_values.get(field.name, own))
    return info
