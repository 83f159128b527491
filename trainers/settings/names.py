"""Names that users type: what `models.names` says of them."""

from models.names import nearest, unknown

__all__ = ["nearest", "unknown"]
