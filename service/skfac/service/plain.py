"""Messages as plain data, for JSON."""

from typing import Any

from google.protobuf.message import Message


def plain_message(message: Message) -> dict[str, Any]:
    """Turn a message into plain data, with all its fields.

    Protobuf's own JSON has 64-bit numbers as strings, and leaves zeros out unless it is
    told otherwise.

    Returns:
        Values by the names of the fields; None for what is optional and not there.
    """
    return {
        field.name: _plain(getattr(message, field.name))
        if not field.has_presence or message.HasField(field.name)
        else None
        for field in message.DESCRIPTOR.fields
    }


def _plain(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, Message):
        return plain_message(value)
    if isinstance(value, str | int | float):
        return value
    many = list(value)
    return [plain_message(one) if isinstance(one, Message) else one for one in many]
